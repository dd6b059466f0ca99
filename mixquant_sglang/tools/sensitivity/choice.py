"""Which linears and experts there are, what each gains in milliseconds of prefill, and which a budget keeps in BF16.

The choice itself of ``mixquant sensitivity`` (its maths: ``measure.py``); prices are those of ``mixquant plan``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED, block_of
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.tools.plan.cost import Cost
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.predict import predict
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.tools.sensitivity.kl import KL, Group
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.footprint import Placed, by_name, together

_BF16 = Selection("bf16", "bf16", {}, "")


@dataclass(frozen=True)
class Measured:
    """A group, its KL when it alone is in low precision, and the predicted milliseconds of prefill that it gains."""

    group: Group
    kl: KL
    gain_ms: float


@dataclass(frozen=True)
class Run:
    """A recipe as a whole: measured KL, predicted milliseconds of prefill and speed-up against BF16."""

    kl: KL
    prefill_ms: float
    speedup: float


@dataclass(frozen=True)
class Result:
    """``kept``: names of the groups that the budget keeps in BF16; ``given_back`` of ``gain_ms``, both milliseconds."""

    recipe: Recipe
    prefill: str
    model: str
    gpu: str
    input_len: int
    budget: float
    tokens: tuple[int, int]
    groups: tuple[Measured, ...]
    kept: frozenset[str]
    gain_ms: float
    given_back_ms: float
    runs: Mapping[str, Run]  # bf16 (a check: 0), recipe, result
    noise: KL  # what BF16's rounding of the same products does, all groups together
    compute: str  # what all but the groups is computed in

    @property
    def floor(self) -> float:
        """Answer KL of one group below which nothing is known of it."""
        return floor_of(self.noise, len(self.groups), self.compute)

    @property
    def worse(self) -> bool:
        """Whether the recipe that came out does more to the answers than the one that it began with."""
        return self.runs["result"].kl.answer > self.runs["recipe"].kl.answer


class Prices:
    """What ``mixquant plan`` predicts for a model's linears and experts in either precision; ``model`` may be another
    of the same kinds of blocks."""

    def __init__(self, model: Decoder, gpu: Gpu, recipe: Recipe, selection: Selection, input_len: int) -> None:
        self._model, self._gpu, self._recipe, self._selection = model, gpu, recipe, selection
        self._work = Workload(input_len)
        self._bf16 = dict(by_name(model, replace(recipe, layers=()), _BF16))
        self._gains: dict[Placed, float] = {}

    def gain(self, group: Group) -> float:
        """Milliseconds of a prefill: the group in BF16 less the group in low precision, its quantiser and the protected
        row's second GEMM included."""
        placed = self._placed(group)
        if placed not in self._gains:
            cost = Cost(self._gpu, self._model, 1)
            bf16, low = (sum(cost.prefill(self._plan([group], kept), self._work)[0].values()) for kept in ([group], []))
            self._gains[placed] = bf16 - low
        return self._gains[placed]

    def speed(self, groups: Sequence[Group], kept: Sequence[Group]) -> tuple[float, float]:
        """(milliseconds, speed-up against the recipe bf16) with ``groups`` in low precision but for ``kept``."""
        base = self._plan(groups, groups)
        made = predict(self._plan(groups, kept), self._model, self._gpu, self._work, base)
        return made.prefill_ms, made.prefill_speedup

    def _placed(self, group: Group) -> Placed:
        found = self._bf16.get(group.name)
        if found is None:
            raise MixQuantError(f"--priced-as: {self._model.name} has no {group.name}; name a model of the same family")
        return replace(found, prefill=group.precision)

    def _plan(self, groups: Sequence[Group], kept: Sequence[Group]) -> Plan:
        low = {group.name: self._placed(group) for group in groups if group not in kept}
        recipe, kernels = self._recipe, self._selection.kernels
        return Plan(
            recipe.name,
            "",
            tuple(together((self._bf16 | low).values())),
            recipe.protect_last_prompt_token,
            recipe.min_tokens or 1,
            keeps_bf16=True,
            emulated=frozenset(precision for precision in kernels if kernels[precision] == "emulated"),
            fused=recipe.fuse and self._model.is_plain,
            gathers=recipe.fuse,
            tail=recipe.protected_tail,
        )


def groups_of(recipe: Recipe, selection: Selection, model: Decoder) -> list[Group]:
    """The linears and experts that the recipe prefills in low precision, in the order of the layers."""
    if recipe.prefill_weights:
        raise MixQuantError(
            f"{recipe.prefill_weights_at}: `sensitivity` packs the BF16 weights by itself; leave prefill.weights out"
        )
    matcher = RuleMatcher((), FUSED)
    groups = []
    for name, placed in by_name(model, recipe, selection):
        if placed.decode != "bf16":
            raise MixQuantError(
                f"{recipe.source}: {name} decodes in {placed.decode}; `sensitivity` weighs what prefill does to a BF16 "
                "decode; allowed: 'decode: {precision: bf16}', and no other in its rules"
            )
        if placed.prefill != "bf16":
            members = () if placed.experts else matcher.shards(name) or (name,)
            groups.append(Group(name, placed.name, block_of(name) or 0, members, placed.prefill))
    if not groups:
        raise MixQuantError(f"recipe {recipe.name} prefills every linear of {model.name} in bf16: nothing to measure")
    return groups


def floor_of(noise: KL, groups: int, compute: str) -> float:
    """Answer KL of one group below which nothing is known of it, from the ``noise`` of all of them.

    Computed in FP32 independent errors add up, so twice the share of one.  Computed in BF16 they do not: one other
    rounding anywhere changes as many behind it as many do."""
    return noise.answer if compute == "bfloat16" else 2 * noise.answer / groups


def choose(measured: Sequence[Measured], budget_ms: float, floor: float = 0.0) -> frozenset[str]:
    """The groups to keep in BF16: those without a gain, then by KL per millisecond what still fits; none whose answer
    KL is at or below ``floor``, which says nothing."""
    kept = {one.group.name for one in measured if one.gain_ms <= 0}
    known = (one for one in measured if one.gain_ms > 0 and not 0 < one.kl.answer <= floor)
    paid = sorted(known, key=lambda one: one.kl.answer / one.gain_ms, reverse=True)
    spent: list[float] = []
    for one in paid:
        if math.fsum([*spent, one.gain_ms]) <= budget_ms * (1 + 1e-9):
            spent.append(one.gain_ms)
            kept.add(one.group.name)
    return frozenset(kept)
