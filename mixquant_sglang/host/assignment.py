"""Which precisions each linear of the model gets, asked by SGLang layer by layer while it builds the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY, stored
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED, NEVER, is_experts, why_bf16
from mixquant_sglang.recipe.schema import LayerRule, Recipe
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.quantised_linear import QuantisedLinear
from mixquant_sglang.weights.ready_made import ReadyMadeWeights
from mixquant_sglang.weights.ready_made_experts import ReadyMadeExperts
from mixquant_sglang.weights.ready_made_linear import ReadyMadeLinear


@dataclass(frozen=True)
class Assigned:
    """``why``: what makes it BF16, where it is; ``ready``: where its NVFP4 weights are, if they are ready-made;
    ``quantised``: where its only weight is, if the checkpoint is quantised."""

    prefill: str
    decode: str
    why: str
    ready: ReadyMadeLinear | None = None
    ready_experts: ReadyMadeExperts | None = None
    quantised: QuantisedLinear | None = None

    @property
    def bf16(self) -> bool:
        return (self.prefill, self.decode) == ("bf16", "bf16")


class Assignment:
    """Of one model that SGLang builds."""

    def __init__(
        self,
        recipe: Recipe,
        selection: Selection,
        ready: ReadyMadeWeights | None,
        quantised: QuantisedCheckpoint | None = None,
    ) -> None:
        self.names: dict[str, None] = {}  # that SGLang asked about, in its order
        self.left: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()  # to SGLang, and why
        self.ready = ready
        self.quantised = quantised
        self.matcher: RuleMatcher | None = None
        self._recipe = recipe
        self._selection = selection

    def of(self, name: str, packed_modules: Mapping[str, Sequence[str]]) -> Assigned:
        """Of the linear, or the MoE layer, ``name``; ``packed_modules``: the model's ``packed_modules_mapping``."""
        if self.matcher is None:
            self.matcher = RuleMatcher(self._recipe.layers, {**FUSED, **packed_modules})
        self.names[name] = None
        selection, shards = self._selection, self.matcher.shards(name)
        prefill, decode = self.matcher.precisions(name, selection.prefill, selection.decode)
        never = why_bf16(name)
        why = "by rule of the recipe" if selection.kernels else "by the recipe"
        if never:
            prefill = decode = "bf16"
            why = never
        if self.quantised is not None:
            return self._of_quantised(self.quantised, name, shards, prefill, decode, why)
        linear = experts = None
        if self.ready is not None and "nvfp4" in (prefill, decode):
            if is_experts(name):
                experts = self.ready.experts(name)
            else:
                linear = self.ready.linear(name, shards)
            if linear is None and experts is None:
                why = "not in the ready-made weights"
                prefill, decode = ("bf16" if p == "nvfp4" else p for p in (prefill, decode))
        elif self.ready is not None and is_experts(name):
            self.ready.keep_experts(name, NEVER if never else why)
        elif self.ready is not None:
            self.ready.keep(name, shards, NEVER if never else why)
        return Assigned(prefill, decode, why, linear, experts)

    def _of_quantised(
        self,
        checkpoint: QuantisedCheckpoint,
        name: str,
        shards: Sequence[str],
        prefill: str,
        decode: str,
        why: str,
    ) -> Assigned:
        """What the checkpoint has in BF16 stays BF16; what it has quantised runs as it is, or is multiplied out."""
        if is_experts(name):
            checkpoint.check_experts(name)
            return Assigned("bf16", "bf16", "BF16 in the checkpoint")
        if (prefill, decode) == ("bf16", "bf16"):
            checkpoint.keep(name, shards, why)
            return Assigned(prefill, decode, why)
        modules = checkpoint.of_linear(name, shards)
        if not modules:
            return Assigned("bf16", "bf16", "BF16 in the checkpoint")
        precision = checkpoint.family.precision
        if decode not in WEIGHT_ONLY or {stored(prefill), stored(decode)} != {precision}:
            raise MixQuantError(
                f"{checkpoint.folder}: {modules[0]} is {precision.upper()}, but recipe {self._recipe.name} wants "
                f"{name} in {prefill} and {decode}; ask for what {checkpoint.family.recipe} does, or bf16 in both"
            )
        return Assigned(prefill, decode, why, quantised=QuantisedLinear(checkpoint, name, modules))

    def asking(self, name: str) -> tuple[LayerRule, ...]:
        """The rules that want the linear ``name`` low, not counting optional ones."""
        assert self.matcher is not None
        return self.matcher.asking(name)
