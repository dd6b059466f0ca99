"""What a plan takes for a workload, and against BF16: times, gain, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mixquant_sglang.tools.plan.cost import Cost
from mixquant_sglang.tools.plan.cost_experts import rate_of
from mixquant_sglang.tools.plan.gathering import gathering_of
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.hosts import SERVER, WAITS, Host
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.recipes import STOCK_BF16, make_plan
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.footprint import MEMORY_SHARE, footprint_of

BASELINE = STOCK_BF16


@dataclass(frozen=True)
class Prediction:
    """Milliseconds for the whole batch: its prefill, one decode step at the mean context. Ratios: above 1 is faster
    than stock BF16. Bytes and KV tokens per GPU. ``prefill_parts``: milliseconds by cause. ``points``: (FLOP/byte,
    FLOP/s) of the prefill and of a decode step, per GPU. ``sources``: where the rates of the experts' grouped GEMMs
    come from, by precision. ``stays_bf16``: linears and experts that no kernel takes, and why. ``notes``: what else
    decides or limits the figures, a line each."""

    recipe: str
    describe: str
    prefill_ms: float
    decode_ms: float
    prefill_speedup: float
    end_to_end_speedup: float
    extra_weight_bytes: int
    kv_tokens_displaced: int
    fits: bool
    prefill_parts: Mapping[str, float]
    points: Mapping[str, tuple[float, float]]
    sources: Mapping[str, str]
    stays_bf16: Mapping[str, str]
    notes: tuple[str, ...]


def predict(
    plan: Plan, model: Decoder, gpu: Gpu, work: Workload, baseline: Plan | None = None, host: Host = SERVER
) -> Prediction:
    """What ``plan`` takes for ``work``; ``baseline`` is what the ratios are against (stock BF16 by default)."""
    baseline = baseline or make_plan(BASELINE, model, gpu, work.tp, ep=work.ep)
    cost = Cost(gpu, model, work.tp)
    parts, flops, moved = cost.prefill(plan, work)
    parts["host"] = host.request_ms + host.token_us * work.input_len * work.batch / 1e3
    context = work.input_len + work.output_len / 2
    step, step_flops, step_moved = cost.decode(plan, work.batch, context)
    prefill, decode = sum(parts.values()), step + host.step_ms
    if baseline == plan:
        prefill_speedup = end_to_end = 1.0
    else:
        base = predict(baseline, model, gpu, work, baseline, host)
        steps = work.output_len - 1  # the first token comes from the prefill
        prefill_speedup = base.prefill_ms / prefill
        end_to_end = (base.prefill_ms + steps * base.decode_ms) / (prefill + steps * decode)
    memory = footprint_of(model, plan.placed, work.tp, work.ep, masters=plan.keeps_bf16)
    gathering = gathering_of(plan, cost.roof)
    needed = memory.needed(work.batch * (work.input_len + work.output_len), work.batch)
    needed += gathering.scratch if gathering else 0
    return Prediction(
        recipe=plan.recipe,
        describe=plan.describe,
        prefill_ms=prefill,
        decode_ms=decode,
        prefill_speedup=prefill_speedup,
        end_to_end_speedup=end_to_end,
        extra_weight_bytes=plan.extra_weight_bytes,
        kv_tokens_displaced=math.ceil(plan.extra_weight_bytes / memory.kv_token) if memory.kv_token else 0,
        fits=needed <= MEMORY_SHARE * gpu.memory,
        prefill_parts=parts,
        points={
            "prefill": (flops / moved, flops / (prefill / 1e3)),
            "decode": (step_flops / step_moved, step_flops / (decode / 1e3)),
        },
        sources=_sources(plan, gpu),
        stays_bf16=plan.stays_bf16,
        notes=(*([gathering.describe()] if gathering else []), *([WAITS] if parts.get("waiting") else [])),
    )


def _sources(plan: Plan, gpu: Gpu) -> dict[str, str]:
    used = dict.fromkeys(precision for one in plan.experts for precision in (one.prefill, one.decode))
    return {
        precision: rate_of(gpu.rates.experts, precision, precision in plan.emulated, plan.stock).source
        for precision in used
    }
