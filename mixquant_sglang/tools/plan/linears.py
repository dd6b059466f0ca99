"""Which linears and experts run how: a recipe on a model and a GPU, as ``mixquant plan`` counts it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mixquant_sglang.recipe.capabilities import keeps_master
from mixquant_sglang.weights.footprint import Placed


@dataclass(frozen=True)
class Plan:
    """A recipe on a GPU and a model: what runs how. ``emulated``: precisions without a kernel of their own there.
    ``fused``: prefill quantises within norms and SiLU, writes q apart and leaves out the last layer's unread rows.
    ``stock``: another server's low precision, so never fused."""

    recipe: str
    describe: str
    placed: tuple[Placed, ...]
    protect: bool
    min_tokens: int
    keeps_bf16: bool  # the BF16 master stays beside the packed weights
    emulated: frozenset[str] = frozenset()
    fused: bool = True
    stock: bool = False
    gathers: bool = False  # prefill attention may read keys and values out of a copy of their pages
    measures: bool = False  # ``min_tokens`` is what a server measures
    tail: int = 1  # tokens at the end of each prompt that ``protect`` keeps in the decode precision

    @cached_property
    def linears(self) -> tuple[Placed, ...]:
        return tuple(one for one in self.placed if not one.experts)

    @cached_property
    def experts(self) -> tuple[Placed, ...]:
        return tuple(one for one in self.placed if one.experts)

    @property
    def stays_bf16(self) -> dict[str, str]:
        """Why what is asked for in low precision is BF16, by name; where some of that name are, how many."""
        made = {}
        for name, why in {(one.name, one.refusal): None for one in self.placed if one.refusal}:
            alike = [one for one in self.placed if one.name == name]
            these, total = sum(o.count for o in alike if o.refusal == why), sum(o.count for o in alike)
            made[name] = f"{why}" if these == total else f"{why} ({these} of {total})"
        return made

    @property
    def has_bf16(self) -> bool:
        """Whether short passes can run in BF16 (``min_tokens``)."""
        return all(keeps_master(one.prefill, one.decode) for one in self.placed)

    @property
    def extra_weight_bytes(self) -> int:
        """Bytes per GPU beside the BF16 weights; below zero where they are replaced (stock-fp8, fp8-compact)."""
        replaced = [
            one
            for one in self.placed
            if one.extra_bytes and not (self.keeps_bf16 and keeps_master(one.prefill, one.decode))
        ]
        extra = sum(one.extra_bytes for one in self.placed)
        return extra - sum(one.count * one.bytes_in("bf16") for one in replaced)
