"""Does it fit: what a recipe takes of a GPU's memory for a workload, how many GPUs it needs, what else would fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mixquant_sglang.recipe.select import Device
from mixquant_sglang.tools.plan.gathering import gathering_of
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.recipes import make_plan
from mixquant_sglang.tools.plan.roofline import Roofline
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.footprint import MEMORY_SHARE, RANKS, Footprint, footprint_of, that_fit


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. ``usable``: for weights and cache, of ``gpu``. ``parts``: of the weights. ``kv_token``,
    ``request``: of one more token of context, and of one more request's recurrent states. ``scratch``: of attention's
    gathered keys and values, at most. ``needed``: by the workload.
    ``kv_tokens_left``: that the cache has room for beside the weights, below zero where these do not fit.
    ``smallest_tp``: fewest GPUs that hold the workload; None if 64 do not. ``would_fit``: recipes that do on as many
    GPUs as were asked for, where this one does not; a rule in braces belongs into a copy of the recipe."""

    gpu: int
    usable: int
    parts: Mapping[str, int]
    weights: int
    kv_token: int
    request: int
    scratch: int
    needed: int
    fits: bool
    kv_tokens_left: int
    smallest_tp: int | None
    would_fit: tuple[str, ...]


def memory_of(plan: Plan, model: Decoder, gpu: Gpu, work: Workload) -> Memory:
    """``plan``: from ``make_plan``."""
    usable = MEMORY_SHARE * gpu.memory
    made = _footprint(plan, model, work.tp, work.ep)
    tokens = work.batch * (work.input_len + work.output_len)
    scratch = _scratch(plan, model, gpu, work.tp)
    needed = made.needed(tokens, work.batch) + scratch
    fits = needed <= usable
    others = [] if fits else that_fit(model, gpu.memory, _device(gpu), work.tp, work.ep, tokens, work.batch)
    return Memory(
        gpu=int(gpu.memory),
        usable=int(usable),
        parts=made.parts(),
        weights=made.weights,
        kv_token=made.kv_token,
        request=made.request,
        scratch=scratch,
        needed=needed,
        fits=fits,
        kv_tokens_left=made.tokens_left(gpu.memory - scratch / MEMORY_SHARE),
        smallest_tp=_smallest_tp(plan, model, gpu, work, tokens),
        would_fit=tuple(name for name, _ in others if name != plan.recipe),
    )


def _smallest_tp(plan: Plan, model: Decoder, gpu: Gpu, work: Workload, tokens: int) -> int | None:
    for tp in RANKS:
        ep = tp if work.ep > 1 else 1
        if model.divides(tp, ep):
            made = _footprint(make_plan(plan.recipe, model, gpu, tp, ep=ep), model, tp, ep)
            if made.needed(tokens, work.batch) + _scratch(plan, model, gpu, tp) <= MEMORY_SHARE * gpu.memory:
                return tp
    return None


def _scratch(plan: Plan, model: Decoder, gpu: Gpu, tp: int) -> int:
    gathering = gathering_of(plan, Roofline(gpu, model, tp))
    return gathering.scratch if gathering else 0


def _footprint(plan: Plan, model: Decoder, tp: int, ep: int) -> Footprint:
    return footprint_of(model, plan.placed, tp, ep, masters=plan.keeps_bf16)


def _device(gpu: Gpu) -> Device:
    return Device(gpu.name, gpu.capability)
