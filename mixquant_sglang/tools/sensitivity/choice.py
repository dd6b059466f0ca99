"""Which groups of linears there are, what each gains in milliseconds of prefill, and which a budget keeps in BF16.

The choice itself of ``mixquant sensitivity`` (its maths: ``measure.py``); prices are those of ``mixquant plan``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.registry import refusal
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.tools.plan.cost import Cost
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.predict import predict
from mixquant_sglang.tools.plan.shapes import linear_shapes
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.tools.sensitivity.kl import KL, Group
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.footprint import Placed


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


class Prices:
    """What ``mixquant plan`` predicts for a model's linears in either precision."""

    def __init__(self, model: Decoder, gpu: Gpu, recipe: Recipe, selection: Selection, input_len: int) -> None:
        self._model, self._gpu, self._recipe, self._selection = model, gpu, recipe, selection
        self._work = Workload(input_len)
        self._shapes = {one.name: one for one in linear_shapes(model, 1)}
        self._gains: dict[tuple[str, str], float] = {}

    def gain(self, group: Group) -> float:
        """Milliseconds of a prefill: the group in BF16 less the group in low precision, its quantiser and the protected
        row's second GEMM included."""
        key = (group.kind, group.precision)
        if key not in self._gains:
            cost = Cost(self._gpu, self._model, 1)
            bf16, low = (sum(cost.prefill(self._plan([group], kept), self._work)[0].values()) for kept in ([group], []))
            self._gains[key] = bf16 - low
        return self._gains[key]

    def speed(self, groups: Sequence[Group], kept: Sequence[Group]) -> tuple[float, float]:
        """(milliseconds, speed-up against the recipe bf16) with ``groups`` in low precision but for ``kept``."""
        base = self._plan(groups, groups)
        made = predict(self._plan(groups, kept), self._model, self._gpu, self._work, base)
        return made.prefill_ms, made.prefill_speedup

    def _plan(self, groups: Sequence[Group], kept: Sequence[Group]) -> Plan:
        placed = []
        for group in groups:
            shape, precision = self._shapes[group.kind], "bf16" if group in kept else group.precision
            placed.append(Placed(shape.name, shape.n, shape.k, 1, precision, "bf16", shape.queries))
        for kind, shape in self._shapes.items():  # what is in BF16 in any case
            count = self._model.layers - sum(group.kind == kind for group in groups)
            placed.append(Placed(kind, shape.n, shape.k, count, "bf16", "bf16", shape.queries))
        recipe, kernels = self._recipe, self._selection.kernels
        return Plan(
            recipe.name,
            "",
            tuple(placed),
            recipe.protect_last_prompt_token,
            recipe.min_tokens,
            keeps_bf16=True,
            emulated=frozenset(precision for precision in kernels if kernels[precision] == "emulated"),
            fused=recipe.fuse,
            tail=recipe.protected_tail,
        )


def groups_of(recipe: Recipe, selection: Selection, model: Decoder) -> list[Group]:
    """The linears that the recipe prefills in low precision, in the order of the layers."""
    if recipe.prefill_weights:
        raise MixQuantError(
            f"{recipe.prefill_weights_at}: `sensitivity` packs the BF16 weights by itself; leave prefill.weights out"
        )
    matcher = RuleMatcher(recipe.layers, FUSED)
    groups, names = [], []
    for layer in range(model.layers):
        for shape in linear_shapes(model, 1):
            name = f"model.layers.{layer}.{shape.name}"
            names.append(name)
            prefill, decode = matcher.precisions(name, selection.prefill, selection.decode)
            if decode != "bf16":
                raise MixQuantError(
                    f"{recipe.source}: {name} decodes in {decode}; `sensitivity` weighs what prefill does to a BF16 "
                    "decode; allowed: 'decode: {precision: bf16}', and no other in its rules"
                )
            if prefill != "bf16" and not refusal(prefill, selection.kernels[prefill], shape.n, shape.k):
                groups.append(Group(name, shape.name, layer, matcher.shards(name) or (name,), prefill))
    matcher.check_all_matched(names)
    if not groups:
        raise MixQuantError(f"recipe {recipe.name} prefills every linear of {model.name} in bf16: nothing to measure")
    return groups


def choose(measured: Sequence[Measured], budget_ms: float) -> frozenset[str]:
    """The groups to keep in BF16: those without a gain, then by KL per millisecond what still fits."""
    kept = {one.group.name for one in measured if one.gain_ms <= 0}
    paid = sorted(
        (one for one in measured if one.gain_ms > 0), key=lambda one: one.kl.answer / one.gain_ms, reverse=True
    )
    spent: list[float] = []
    for one in paid:
        if math.fsum([*spent, one.gain_ms]) <= budget_ms * (1 + 1e-9):
            spent.append(one.gain_ms)
            kept.add(one.group.name)
    return frozenset(kept)
