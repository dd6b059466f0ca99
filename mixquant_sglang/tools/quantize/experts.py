"""The experts of a checkpoint, a linear each in the result, whichever way the checkpoint holds them.

| in the checkpoint | shapes | families |
|---|---|---|
| ``experts.3.gate_proj.weight``, ``up_proj``, ``down_proj`` (``w1``, ``w3``, ``w2``) | [I, H], [I, H], [H, I] | most |
| ``experts.gate_up_proj``, ``experts.down_proj`` | [E, 2I, H], [E, H, I] | Qwen3.5-MoE, Gemma-4 |
| the same, transposed | [E, H, 2I], [E, I, H] | Llama-4, Qwen3-VL-MoE |

The last two become ``experts.3.gate_proj`` and so on, as llm-compressor (``model_free/process.py``) and ModelOpt
(``export/moe_utils.py``) split them, and as SGLang's loaders of these families read them beside the fused form
(``make_expert_params_mapping`` in ``qwen3_5.py``, ``gemma4_mm.py``, ``mllama4.py``, ``qwen3_vl_moe.py``). Shapes tell
the two forms apart.

An engine runs all experts of a layer in one precision, so they are quantised together or not at all. Refused
(MixQuantError): experts in one tensor of other families (gpt-oss has biases and interleaves gate and up, and its loader
knows no other NVFP4 than that), incomplete layers, and ``--ignore`` that names single experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.limits import BLOCK
from mixquant_sglang.recipe import REGEX
from mixquant_sglang.recipe.modules import EXPERT_LEAVES, block_of, expert_of, is_draft, is_outside
from mixquant_sglang.weights.checkpoint import Source

# model_type, of the model or of its text_config, whose experts SGLang's loader takes one by one beside the fused form.
SPLIT = ("gemma4", "llama4", "qwen3_5_moe", "qwen3_vl_moe")
_FUSED = ("gate_up_proj", "down_proj")
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys of config.json


@dataclass(frozen=True)
class Part:
    """Where a linear [n, k] lies in ``tensor``, which holds all experts of a layer: rows ``start`` to ``start + n`` of
    expert ``expert``, or, transposed, as many columns."""

    tensor: str
    n: int
    k: int
    expert: int
    start: int
    transposed: bool


def layers_in_one(source: Source) -> dict[str, set[str]]:
    """MoE layer -> the last parts of the names of its tensors that are not those of single experts, if one of them has
    three dimensions."""
    found: dict[str, set[str]] = {}
    for name in source.tensors:
        layer, _, leaf = name.rpartition(".")
        if layer.rpartition(".")[2] == "experts":
            found.setdefault(layer, set()).add(leaf)
    return {
        layer: leaves
        for layer, leaves in found.items()
        if any(len(source.tensors[f"{layer}.{leaf}"].shape) == 3 for leaf in leaves)
    }


def _counts(config: Mapping[str, object]) -> set[int]:
    """Of experts, by config.json; a list, of texts and of images, says nothing."""
    return {count for key in _COUNTS if isinstance(count := config.get(key), int)}


def elsewhere(source: Source, config: Mapping[str, object], layers: int) -> None:
    """Refuses experts in one tensor that no module called ``experts`` has, such as GraniteMoE's ``input_linear``."""
    counts = _counts(config)
    for name, stored in source.tensors.items():
        block = block_of(name)
        if block is None or block >= layers or is_draft(name) or is_outside(name) or "experts" in name.split("."):
            continue
        if len(stored.shape) == 3 and stored.shape[0] in counts and min(stored.shape) > 1:
            raise MixQuantError(
                f"{source.folder}: {name} {list(stored.shape)} holds all experts of a layer in a form that is not known"
            )


def split(source: Source, layer: str, leaves: Iterable[str], family: str) -> dict[str, Part]:
    """The linears of ``layer``, whose experts lie in one tensor; ``family``: its model_type."""
    at = f"{source.folder}: {layer}"
    leave = f"leave it BF16 with --ignore '{REGEX}.*experts'"
    if family.removesuffix("_text") not in SPLIT or set(leaves) != {*_FUSED}:
        raise MixQuantError(
            f"{at} holds all experts in one tensor ({', '.join(sorted(leaves))}), which can be written expert by "
            f"expert for {', '.join(SPLIT)}, and this is {family or 'a model without model_type'}; {leave}"
        )
    gate_up, down = (source.tensors[f"{layer}.{leaf}"].shape for leaf in _FUSED)
    (experts, rows, columns), transposed = gate_up if len(gate_up) == 3 else (0, 0, 0), False
    if down == (experts, columns, rows // 2) and rows % 2 == 0:
        inner, hidden = rows // 2, columns
    elif down == (experts, columns // 2, rows) and columns % 2 == 0:
        inner, hidden, transposed = columns // 2, rows, True
    else:
        raise MixQuantError(f"{at}.gate_up_proj is {list(gate_up)}, which does not fit down_proj {list(down)}; {leave}")
    made = {}
    for expert in range(experts):
        name = f"{layer}.{expert}"
        made[f"{name}.gate_proj"] = Part(f"{layer}.gate_up_proj", inner, hidden, expert, 0, transposed)
        made[f"{name}.up_proj"] = Part(f"{layer}.gate_up_proj", inner, hidden, expert, inner, transposed)
        made[f"{name}.down_proj"] = Part(f"{layer}.down_proj", hidden, inner, expert, 0, transposed)
    return made


def by_layer(modules: Iterable[str]) -> dict[str, list[str]]:
    """MoE layer -> the linears of its experts among ``modules``."""
    found: dict[str, list[str]] = {}
    for module in modules:
        if expert := expert_of(module):
            found.setdefault(expert[0], []).append(module)
    return found


def ignored_whole(layer: str, modules: Iterable[str], ignored: Mapping[str, str]) -> str | None:
    """The pattern of ``--ignore`` that matches ``layer`` or all of its linears ``modules``; refused if only some."""
    if layer in ignored:
        return ignored[layer]
    patterns = {module: ignored.get(module) for module in modules}
    named = [pattern for pattern in patterns.values() if pattern is not None]
    if named and len(named) < len(patterns):
        some = next(module for module, pattern in patterns.items() if pattern is not None)
        raise MixQuantError(
            f"--ignore {named[0]}: matches {some}, but not all of {layer}, whose experts an engine runs in one "
            f"precision; ignore {layer}, or none of it"
        )
    return named[0] if named else None


def why_kept(
    source: Source, layer: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> str | None:
    """Why the experts of ``layer`` cannot be quantised, or None; ``shapes``: [N, K] of its linears. MixQuantError if
    some are missing by what the others have or by ``config``."""
    leaves: dict[int, set[str]] = {}
    for module in shapes:
        _, expert, leaf = expert_of(module) or ("", 0, "")
        leaves.setdefault(expert, set()).add(leaf)
    whole = set().union(*leaves.values())
    if whole not in [{*names} for names in EXPERT_LEAVES]:
        allowed = " or ".join(", ".join(names) for names in EXPERT_LEAVES)
        raise MixQuantError(
            f"{source.folder}: experts of {layer} have {', '.join(sorted(whole))}; allowed: {allowed}; leave them BF16 "
            f"with --ignore {layer}"
        )
    counts = _counts(config)
    for expert in range(max(leaves) + 1):
        if missing := whole - leaves.get(expert, set()):
            raise MixQuantError(f"{source.folder}: {layer}.{expert}.{min(missing)}.weight is missing")
    if counts and len(leaves) not in counts:
        raise MixQuantError(
            f"{source.folder}: {layer} has {len(leaves)} experts, but config.json says {' or '.join(map(str, counts))}"
        )
    for leaf in sorted(whole):
        sizes = {shape for module, shape in shapes.items() if module.endswith(f".{leaf}")}
        if len(sizes) > 1:
            one, other = sorted(sizes)[:2]
            raise MixQuantError(
                f"{source.folder}: {layer}: {leaf} is {list(one)} in one expert, {list(other)} in another"
            )
    odd = ((module, shape[1]) for module, shape in shapes.items() if shape[1] % BLOCK or not shape[1])
    return next((f"K = {k} of {module} is not a multiple of {BLOCK}" for module, k in odd), None)
