"""Ready-made prefill weights: an NVFP4 checkpoint, calibrated by somebody else, beside the BF16 one that decodes.

``prefill: {weights: PATH_OR_NAME}`` in a recipe.  Two conventions, told apart by the checkpoint's quantization config:

| | codes, uint8 [N, K/2] | block scales, float8_e4m3fn [N, K/16] | tensor scale, float32, one number |
|---|---|---|---|
| compressed-tensors, ``nvfp4-pack-quantized`` | weight_packed | weight_scale | 1 / weight_global_scale |
| ModelOpt, NVFP4 and W4A16_NVFP4 | weight | weight_scale | weight_scale_2 |

The codes and scales are used as they are.  Parts of a fused linear may have different tensor scales: they stay parts
then, each with its own GEMM, for folding one scale into another would round block scales again.  The activation scales
(input_global_scale, input_scale) and those of a quantised KV cache are not used: activations are scaled by token
(``formats/nvfp4.py``).  Norms, embeddings and all that is not quantised there come from the BF16 checkpoint.

Experts have tensors of their own, as linears have them (``ready_made_experts.py``); a MoE layer has one precision.

Files are read by their headers first, and then linear by linear: a rank reads its rows.  Refused (MixQuantError, with
the tensor and its file): other formats, missing, extra or misshapen tensors, block scales that are negative or NaN,
tensor scales outside [2^-126, 2^126], and weights that are not those of the BF16 checkpoint: other dimensions, other
norms, or codes that are not the nearest to its values (``rounding: any``: of another scale, or a quarter of the norm
away).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.modules import EXPERT_LEAVES, NEVER, block_of, expert_of, is_never_low
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.hub import find
from mixquant_sglang.weights.layouts import detect
from mixquant_sglang.weights.names import Names
from mixquant_sglang.weights.nvfp4_checkpoint import NVFP4Checkpoint
from mixquant_sglang.weights.ready_made_experts import ReadyMadeExperts
from mixquant_sglang.weights.ready_made_linear import ReadyMadeLinear
from mixquant_sglang.weights.shard import DTYPES

# Dimensions that both configs have to agree on, where both have them.
_DIMENSIONS = (
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "moe_intermediate_size"),
)
_SMOOTHED = ("pre_quant_scale", "input_smooth_scale")


@dataclass
class ReadyMadeWeights(NVFP4Checkpoint):
    """An NVFP4 checkpoint, and which of its modules the layers of a model take."""

    unused: dict[str, str] = field(default_factory=dict)  # module -> why no layer takes it

    @classmethod
    def open(cls, asked: str, where: str, rounding: str = "nearest") -> ReadyMadeWeights:
        """``asked``: a folder, or a name on the hub; ``where`` begins the error messages; ``rounding``: which codes are
        taken, one of ``recipe.ROUNDINGS``."""
        try:
            opened = cls._open(Source.open(find(asked)))
        except MixQuantError as error:
            raise MixQuantError(f"{where}: {error}") from None
        opened.rounding = rounding
        return opened

    @classmethod
    def _open(cls, source: Source) -> ReadyMadeWeights:
        layout = detect(source)
        leaves: dict[str, set[str]] = {}
        marks = set()
        for name, stored in source.tensors.items():
            module, _, leaf = name.rpartition(".")
            leaves.setdefault(module, set()).add(leaf)
            if leaf in (layout.scales, layout.tensor_scale) or (leaf == layout.codes and stored.dtype == "U8"):
                marks.add(module)
        opened = cls(source, layout, {module: leaves[module] for module in leaves if module in marks})
        if not opened.quantised:
            raise MixQuantError(f"{source.folder}: holds no {layout.name} NVFP4 weight")
        for module, found in opened.quantised.items():
            opened._check_complete(module, found)
        return opened

    def check_model(self, config: Any) -> None:
        """Refuses a checkpoint of another model; ``config``: what transformers makes of the BF16 one's config.json."""
        here = getattr(config, "text_config", None) or config
        there = self.source.config.get("text_config", self.source.config)
        for key in _DIMENSIONS:
            bf16, nvfp4 = getattr(here, key, None), there.get(key)
            if bf16 is not None and nvfp4 is not None and bf16 != nvfp4:
                raise MixQuantError(
                    f"{self.folder / 'config.json'}: {key} is {nvfp4}, but {bf16} in the BF16 checkpoint; "
                    "prefill.weights has to hold the same model in NVFP4"
                )

    def linear(self, name: str, shards: Sequence[str]) -> ReadyMadeLinear | None:
        """The linear ``name``, which holds ``shards``; None if the checkpoint keeps it in BF16."""
        modules = self._modules(name, shards)
        there = [module for module in modules if module in self.quantised]
        for module in modules:
            weight = self.source.tensors.get(f"{module}.weight")
            if module in self.quantised or (weight is not None and weight.dtype in DTYPES and not there):
                continue
            if weight is None:
                raise MixQuantError(f"{self.folder}: {module}.{self.layout.codes} is missing")
            rule = f"{{match: {name}, prefill: bf16}}"
            raise MixQuantError(
                f"{self.file(f'{module}.weight')}: {module}.weight is {weight.dtype}"
                + (f", but {there[0]} is NVFP4, and {name} is one GEMM" if there else "")
                + f"; keep {name} in BF16 with a recipe rule '{rule}'"
            )
        if not there:
            return None
        self.taken.update(there)
        return ReadyMadeLinear(self, name, modules)

    def experts(self, name: str) -> ReadyMadeExperts | None:
        """Those of SGLang's MoE layer ``name``; None if the checkpoint keeps them in BF16. A layer has one precision:
        refused are experts of which some are NVFP4, and those that lie in one tensor."""
        layer = self._layer(name)
        linears = self._experts.get(layer, set())
        there = linears & self.quantised.keys()
        rule = f"keep {name} in BF16 with a recipe rule '{{match: {name}, prefill: bf16}}'"
        if not there:
            self._check_bf16(layer, linears, rule)
            return None
        if linears - there:
            raise MixQuantError(
                f"{self.folder}: {min(linears - there)} is not NVFP4, but {min(there)} is, and {name} has one "
                f"precision; {rule}"
            )
        found = {module.rpartition(".")[2] for module in there}
        leaves = next((each for each in EXPERT_LEAVES if found == {*each}), None)
        if leaves is None:
            known = " or ".join(", ".join(each) for each in EXPERT_LEAVES)
            raise MixQuantError(f"{self.folder}: experts of {layer} have {', '.join(sorted(found))}; allowed: {known}")
        self.taken.update(there)
        return ReadyMadeExperts(self, name, layer, leaves)

    def keep_experts(self, name: str, reason: str) -> None:
        """The MoE layer ``name`` stays BF16, so it does not take what the checkpoint has for it."""
        linears = self._experts.get(self._layer(name), set())
        self.unused.update({module: reason for module in linears if module in self.quantised})

    def keep(self, name: str, shards: Sequence[str], reason: str) -> None:
        """``name`` stays BF16, so it does not take what the checkpoint has for it."""
        self.unused.update({m: reason for m in self._modules(name, shards) if m in self.quantised})

    def check_all_taken(self) -> None:
        """Refuses quantised modules that no layer of the model took or kept; call it when all have asked."""
        layers = self.source.config.get("text_config", self.source.config).get("num_hidden_layers", math.inf)
        for module in self.quantised.keys() - self.taken - self.unused.keys():
            block = block_of(module)
            if not is_never_low(module) and not (block is not None and block >= layers):
                name = f"{module}.{self.layout.codes}"
                raise MixQuantError(f"{self.file(name)}: {name} belongs to no layer of this model")
            self.unused[module] = NEVER

    def check_norms(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Refuses vectors of the same name that differ: another model, or one smoothed into its norms."""
        for name, parameter in parameters:
            name = self.names.of(name)
            stored = self.source.tensors.get(name)
            if stored is None or stored.dtype not in DTYPES or parameter.ndim != 1 or stored.shape != parameter.shape:
                continue
            if not torch.equal(self.source.read(name).to(parameter.dtype), parameter.detach().cpu()):
                raise MixQuantError(
                    f"{self.file(name)}: {name} is not that of the BF16 checkpoint; prefill.weights has to be "
                    "quantised from that very checkpoint, without smoothing"
                )

    @cached_property
    def names(self) -> Names:
        """From SGLang's to the checkpoint's."""
        return Names(self.source.tensors)

    @cached_property
    def _experts(self) -> dict[str, set[str]]:
        """MoE layer -> the linears of its experts, in whatever precision."""
        found: dict[str, set[str]] = {}
        for module in {name.rpartition(".")[0] for name in self.source.tensors}:
            if expert := expert_of(module):
                found.setdefault(expert[0], set()).add(module)
        return found

    def _layer(self, name: str) -> str:
        """The checkpoint's name of the MoE layer ``name``. Gemma-4's lies in its block, SGLang's in ``moe`` there."""
        layer = self.names.of(name)
        if layer.endswith(".moe.experts") and not any(t.startswith(f"{layer}.") for t in self.source.tensors):
            return layer.removesuffix(".moe.experts") + ".experts"
        return layer

    def _check_bf16(self, layer: str, linears: Collection[str], rule: str) -> None:
        """Refuses experts that are neither NVFP4 nor BF16."""
        names = [f"{module}.weight" for module in linears]
        names = names or [name for name in self.source.tensors if name.rpartition(".")[0] == layer]
        if not names:
            raise MixQuantError(f"{self.folder}: {layer} is missing")
        for name in sorted(names):
            stored = self.source.tensors.get(name)
            if stored is None or stored.dtype not in DTYPES:
                what = stored.dtype if stored else "missing"
                raise MixQuantError(f"{self.folder}: {name} is {what}; experts are read one by one, in NVFP4; {rule}")

    def _modules(self, name: str, shards: Sequence[str]) -> tuple[str, ...]:
        name, shards = self.names.of(name), tuple(map(self.names.of, shards))
        whole = not shards or name in self.quantised or f"{name}.weight" in self.source.tensors
        return (name,) if whole else tuple(shards)

    def _check_complete(self, module: str, found: set[str]) -> None:
        layout = self.layout
        for leaf in (layout.codes, layout.scales, layout.tensor_scale):
            if leaf not in found:
                raise MixQuantError(f"{self.folder}: {module}.{leaf} is missing")
        for leaf in sorted(found - layout.known):
            raise MixQuantError(
                f"{self.file(f'{module}.{leaf}')}: {module}.{leaf} is no tensor of {layout.name}'s NVFP4"
                + ("; weights that were scaled by input channel do not fit the BF16 checkpoint" * (leaf in _SMOOTHED))
            )
