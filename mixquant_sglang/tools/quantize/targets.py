"""Which linears of a checkpoint are quantised, with which they share a scale, and why others stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.limits import BLOCK
from mixquant_sglang.recipe import REGEX, did_you_mean, nearest, show
from mixquant_sglang.recipe.modules import NEVER, SCALE_GROUPS, block_of, expert_of, is_draft, why_bf16
from mixquant_sglang.tools.quantize import experts
from mixquant_sglang.tools.quantize.experts import Part
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.quantised_config import said
from mixquant_sglang.weights.shard import DTYPES

WEIGHT = ".weight"
_LINEARS = re.compile(r"(?:[qkvo]|qkv|q_[ab]|out|gate|up|gate_up|down)_proj|kv_a_proj_with_mqa|w[123]")
_QUANTISED = re.compile(
    r".*\.(weight_(packed|scale|scale_inv|scale_2|global_scale)|input_(global_)?scale|qweight|qzeros|weight\.absmax)$"
)


# SGLang's loader of Llama-4 puts rows of q and k in another order (``permute_qk_weight_for_rotary``), of BF16 alone.
_REORDERED = "SGLang's loader reorders it, which it can do in BF16 alone"


@dataclass(frozen=True)
class Targets:
    """Which linears are quantised. ``quantised``: module -> the modules with which it shares its scales, itself among
    them; ``kept``: other modules with a matrix for a weight, and MoE layers, -> why they stay as they are; ``parts``:
    modules of ``quantised`` that have no tensor of their own."""

    quantised: dict[str, tuple[str, ...]]
    kept: dict[str, str]
    left_out: tuple[str, ...] = ()  # safetensors of the folder that are not the checkpoint's
    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, ignore: Sequence[str]) -> Targets:
        """Of a BF16 checkpoint, but for what the patterns ``ignore`` match."""
        config = _language_config(source)
        refuse_quantised(source)
        shapes = {
            name.removesuffix(WEIGHT): stored.shape
            for name, stored in source.tensors.items()
            if name.endswith(WEIGHT) and len(stored.shape) == 2
        }
        layers, family = _layers(source, config), _family(source, config)
        experts.elsewhere(source, config, layers)
        moe = experts.by_layer(shapes)
        in_one = experts.layers_in_one(source)
        kept: dict[str, str] = dict.fromkeys((e for e in in_one if not is_target(f"{e}.0.up_proj", layers)), NEVER)
        ignored = _ignored([*shapes, *moe, *in_one, "lm_head"], ignore, optional=bool(in_one))
        parts: dict[str, Part] = {}
        for layer in in_one.keys() - kept.keys():
            if layer in ignored:
                kept[layer] = f"--ignore {ignored[layer]}"
            else:
                parts |= experts.split(source, layer, in_one[layer], family)
        shapes |= {module: (part.n, part.k) for module, part in parts.items()}
        ignored = _ignored([*shapes, *moe, *in_one, "lm_head"], ignore)
        quantised = []
        for layer, modules in experts.by_layer(shapes).items():
            pattern = experts.ignored_whole(layer, modules, ignored)
            if not all(is_target(module, layers) for module in modules):
                kept[layer] = NEVER
            elif pattern is not None:
                kept[layer] = f"--ignore {pattern}"
            elif why := experts.why_kept(source, layer, {m: shapes[m] for m in modules}, config):
                kept[layer] = why
            else:
                quantised += modules
        for module, (_, k) in shapes.items():
            if expert_of(module):
                continue
            if not is_target(module, layers):
                kept[module] = NEVER
            elif family.startswith("llama4") and module.endswith(("q_proj", "k_proj", "v_proj")):
                kept[module] = _REORDERED
            elif module in ignored:
                kept[module] = f"--ignore {ignored[module]}"
            elif k % BLOCK or not k:
                kept[module] = f"K = {k} is not a multiple of {BLOCK}"
            else:
                quantised.append(module)
        if not quantised:
            raise MixQuantError(f"{source.folder}: has no linear to quantise among {len(shapes)} matrices")
        for module in quantised:
            tensor = parts[module].tensor if module in parts else module + WEIGHT
            if (dtype := source.tensors[tensor].dtype) not in DTYPES:
                raise MixQuantError(f"{source.folder}: {tensor} is {dtype}; allowed: {', '.join(DTYPES)}")
        groups = {module: _group(module, shapes, kept) for module in quantised}
        used = {module: part for module, part in parts.items() if module in groups}
        return cls(groups, kept, source.others, used)

    @cached_property
    def made_of(self) -> dict[str, tuple[str, ...]]:
        """Tensor of the source -> the quantised modules that are made of it."""
        found: dict[str, list[str]] = {}
        for module in self.quantised:
            tensor = self.parts[module].tensor if module in self.parts else module + WEIGHT
            found.setdefault(tensor, []).append(module)
        return {tensor: tuple(modules) for tensor, modules in found.items()}

    @property
    def experts(self) -> int:
        """How many of the quantised linears are those of experts."""
        return sum(expert_of(module) is not None for module in self.quantised)


def is_target(module: str, layers: int) -> bool:
    """Whether ``module`` is by its name a linear of one of the first ``layers`` blocks of the language model."""
    block = block_of(module)
    own = block is not None and block < layers and not is_draft(module) and why_bf16(module) is None
    return own and _LINEARS.fullmatch(module.rpartition(".")[2]) is not None


def refuse_quantised(source: Source) -> None:
    """MixQuantError for a checkpoint that is not the BF16 one, by its config, the file beside it or its tensors."""
    _language_config(source)  # a shape that nothing reads ends here
    if found := said(source.config, source.folder, str(source.folder / "config.json")):
        raise MixQuantError(f"{source.folder}: is quantised already ({found[0]}); give its BF16 original")
    if scale := next((name for name in source.tensors if _QUANTISED.match(name)), None):
        raise MixQuantError(f"{source.folder}: is quantised already ({scale}); give its BF16 original")


def _layers(source: Source, config: dict[str, Any]) -> int:
    """Blocks of the model; as good as infinitely many where ``config`` does not say."""
    layers = config.get("num_hidden_layers", 1 << 30)
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        at = f"{source.folder / 'config.json'}: num_hidden_layers"
        raise MixQuantError(f"{at} is {show(json.dumps(layers))}; allowed: an integer of at least 1")
    return layers


def _family(source: Source, config: dict[str, Any]) -> str:
    """model_type of the language model, "" where the config does not say."""
    found = config.get("model_type") or source.config.get("model_type")
    return found if isinstance(found, str) else ""


def _language_config(source: Source) -> dict[str, Any]:
    """That of the language model in a model of several modalities; a null one counts as none."""
    config = source.config.get("text_config")
    if config is None:
        return source.config
    if not isinstance(config, dict):
        raise MixQuantError(f"{source.folder / 'config.json'}: text_config has to be a JSON object")
    return config


def _ignored(modules: Sequence[str], patterns: Sequence[str], *, optional: bool = False) -> dict[str, str]:
    """Module -> the first pattern that matches it; ``re:`` matches from the start, as in compressed-tensors. Refused: a
    pattern that matches none, unless that is ``optional``."""
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            regex = re.compile(pattern.removeprefix(REGEX)) if pattern.startswith(REGEX) else None
        except re.error as error:
            raise MixQuantError(f"--ignore {show(pattern)}: is no regular expression: {error}") from None
        matching = [module for module in modules if (regex.match(module) if regex else module == pattern)]
        if not matching and not optional:
            hint = did_you_mean(nearest(pattern.removeprefix(REGEX), modules))
            raise MixQuantError(f"--ignore {show(pattern)}: matches no module with a matrix{hint}")
        found = dict.fromkeys(matching, pattern) | found
    return found


def _group(module: str, shapes: Collection[str], kept: dict[str, str]) -> tuple[str, ...]:
    """The members that exist of the fused layer to which ``module`` belongs; MixQuantError if some are kept."""
    parent, dot, leaf = module.rpartition(".")
    leaves = next((group for group in SCALE_GROUPS if leaf in group), (leaf,))
    members = tuple(name for name in (f"{parent}{dot}{other}" for other in leaves) if name in shapes)
    for member in members:
        if member in kept:
            raise MixQuantError(
                f"{module} and {member} are one fused layer in an engine, but only {member} would stay BF16 "
                f"({kept[member]}); ignore all of {', '.join(members)}, or none"
            )
    return members
