"""What a prefill and a decode step cost by roofline: the sum over passes and layers (the maths: ``command.py``)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY
from mixquant_sglang.tools.plan.cost_experts import ExpertCost
from mixquant_sglang.tools.plan.cost_linear import LinearCost, format_of
from mixquant_sglang.tools.plan.gathering import attention, gathering_of
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.hosts import RECURRENT_MS
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.rates import at
from mixquant_sglang.tools.plan.roofline import Roofline
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.footprint import Placed, request_bytes
from mixquant_sglang.weights.mixers import DeltaRule

_PARTS = ("linears", "attention", "gather", "elementwise", "quantise", "dequantise", "protected", "all_reduce", "fixed")


def _whole(linear: Placed) -> str:
    """What a pass takes all of whose rows are protected, or that is short."""
    return linear.decode if linear.decode in WEIGHT_ONLY else "bf16"


class Cost:
    """Milliseconds; bytes and FLOPs are those of one of ``tp`` GPUs."""

    def __init__(self, gpu: Gpu, model: Decoder, tp: int) -> None:
        self.model, self.tp, self.rates, self.roof = model, tp, gpu.rates, Roofline(gpu, model, tp)

    def prefill(self, plan: Plan, work: Workload) -> tuple[dict[str, float], float, float]:
        """(milliseconds by cause, FLOPs, bytes) of the whole batch."""
        parts = dict.fromkeys(_PARTS, 0.0)
        if self.model.has_experts:
            parts |= {"experts": 0.0, "move": 0.0}
        if self.model.has_states:
            parts["waiting"] = 0.0
        flops = moved = 0.0
        for rows, ends, count, pairs in work.kinds_of_passes(self.roof.gpu):
            once, once_flops, once_moved = self._pass(plan, rows, ends)
            if self.model.has_states:
                once["waiting"] = self._waiting(plan, rows, ends, pairs / count, sum(once.values()))
            for name, ms in once.items():
                parts[name] += count * ms
            flops, moved = flops + count * once_flops, moved + count * once_moved
        gathering = gathering_of(plan, self.roof)
        for block, count in self.model.kinds:
            if isinstance(block.mixer, DeltaRule):
                continue
            ms, gather = attention(gathering, self.roof, block.mixer, work)
            parts["attention"] += count * ms
            parts["gather"] += count * gather
            flops += count * work.pairs(self.roof.gpu, block.mixer.window) * block.mixer.pair_flops(self.tp)
        if self.model.has_states:
            parts["recurrence"], recurrence = self.roof.recurrence(work.new * work.batch)
            flops += recurrence
        return parts, flops, moved

    def _is_low(self, plan: Plan, rows: int, ends: int) -> tuple[bool, int]:
        """Whether a pass runs in the prefill precision; its protected rows."""
        protected = min(rows, ends * plan.tail) if plan.protect else 0
        return rows >= plan.min_tokens and protected < rows, protected

    def _waiting(self, plan: Plan, rows: int, ends: int, pairs: float, ms: float) -> float:
        """Milliseconds that a pass takes beyond the GPU's, of which ``ms`` are known, with ``pairs`` of full attention
        in each layer that has it."""
        for block, count in self.model.kinds:
            if not isinstance(block.mixer, DeltaRule):
                ms += count * pairs * block.mixer.pair_flops(self.tp) / self.roof.attention_rate(block.mixer) * 1e3
        ms += self.roof.recurrence(rows)[0]
        low = self._is_low(plan, rows, ends)[0] and any(one.prefill != "bf16" for one in plan.placed)
        return max(0.0, self.model.layers * at(RECURRENT_MS[low], rows) - ms)

    def _pass(self, plan: Plan, rows: int, ends: int) -> tuple[dict[str, float], float, float]:
        """One pass of ``rows`` in which ``ends`` prompts end, without its attention."""
        parts = dict.fromkeys(_PARTS, 0.0)
        flops = moved = 0.0
        low, protected = self._is_low(plan, rows, ends)
        for linear in plan.linears:
            cost = LinearCost(self.roof, plan, linear)
            precision = linear.prefill if low else _whole(linear)
            emulated = precision in plan.emulated
            fused = plan.fused and precision not in ("bf16", *WEIGHT_ONLY) and not (precision == "fp8" and emulated)
            share = 1.0  # of the layers; in the last one, o_proj and the MLP leave out what nobody reads
            if fused and linear.prefill != linear.decode and linear.name != "self_attn.qkv_proj":
                share -= 1 / self.model.layers
            ms, bytes_ = cost.gemm(precision, emulated, rows, self.rates.copy)
            parts["linears"] += share * ms
            quantise, dequantise = cost.conversions(precision, emulated, rows, fused)
            parts["quantise"] += share * quantise
            parts["dequantise"] += share * dequantise
            ms, elementwise = cost.before(format_of(precision, emulated) if fused else "bf16", rows)
            parts["elementwise"] += ms
            flops += share * 2.0 * rows * linear.n * linear.k * linear.count
            moved += share * bytes_ + elementwise
            if low and plan.protect and linear.prefill != linear.decode:
                ms, bytes_ = cost.protected(protected)
                parts["protected"] += ms
                moved += bytes_
        for expert, placed in self._experts(plan):
            precision = placed.prefill if low else _whole(placed)
            emulated = precision in plan.emulated
            made = {"experts": expert.gemm(precision, emulated, rows), "move": expert.move(precision, rows)}
            made["elementwise"] = expert.norm(rows)
            if low and plan.protect and placed.prefill != placed.decode:
                made["protected"] = expert.protected(protected)
            for name, (ms, bytes_) in made.items():
                parts[name] = parts.get(name, 0.0) + ms
                moved += bytes_
            quantise, dequantise = expert.conversions(precision, emulated, rows)
            parts["quantise"] += quantise
            parts["dequantise"] += dequantise
            flops += expert.flops(rows)
        elementwise = rows * self._elementwise_bytes()
        parts["elementwise"] += self.roof.memory(elementwise, self.rates.copy)
        moved += elementwise
        parts["fixed"] += (self.rates.pass_us + self.model.layers * self.rates.layer_us) / 1e3
        parts["all_reduce"] += self.roof.all_reduce(rows)
        head = 2.0 * self.model.vocab * self.model.hidden / self.tp  # for few rows, so the weights are what it costs
        parts["linears"] += self.roof.memory(head, self.rates.weights)
        moved += head
        return parts, flops, moved

    def decode(self, plan: Plan, batch: int, context: float) -> tuple[float, float, float]:
        """(milliseconds, FLOPs, bytes) of one step of ``batch`` requests that see ``context`` tokens each."""
        head = Placed("lm_head", self.model.vocab // self.tp, self.model.hidden, 1, "bf16", "bf16")
        ms = flops = moved = 0.0
        for linear in (*plan.linears, head):
            emulated = linear.decode in plan.emulated
            cost, how = LinearCost(self.roof, plan, linear), (linear.decode, emulated, batch)
            time, bytes_ = cost.gemm(*how, self.rates.weights)
            ms, moved = ms + time, moved + bytes_
            flops += 2.0 * batch * linear.n * linear.k * linear.count
            if linear.decode in WEIGHT_ONLY:
                ms += sum(cost.conversions(*how, fused=False))
            elif linear.decode != "bf16":
                ms += sum(cost.conversions(*how, fused=False))
                ms += linear.count * self.rates.low_linear_us / 1e3
        for expert, placed in self._experts(plan):
            time, bytes_ = expert.protected(batch)  # the same run
            ms, moved, flops = ms + time, moved + bytes_, flops + expert.flops(batch)
            if placed.decode not in ("bf16", *WEIGHT_ONLY):
                ms += placed.count * 2 * self.rates.low_linear_us / 1e3
        kv = 0.0
        for block, count in self.model.kinds:
            if isinstance(block.mixer, DeltaRule):
                continue
            seen = batch * (min(context, block.mixer.window) if block.mixer.window else context)
            kv += count * seen * block.mixer.kv_bytes(self.tp)
            flops += count * seen * block.mixer.decode_pair_flops(self.tp)
        kv += batch * 2.0 * request_bytes(self.model, self.tp)  # states are read and written
        ms += self.roof.memory(kv, self.rates.kv) + self.roof.all_reduce(batch)
        ms += self.model.layers * (self.rates.decode_layer_us + self.rates.decode_doubling_us * math.log2(batch)) / 1e3
        return ms, flops, moved + kv

    def _experts(self, plan: Plan) -> Iterator[tuple[ExpertCost, Placed]]:
        for placed in plan.experts:
            if placed.experts:
                yield ExpertCost(self.roof, plan, placed, placed.experts), placed

    def _elementwise_bytes(self) -> float:
        """Per token row, beside what writes the inputs of linears: what mixers do by themselves, such as rope with q
        and k norms and the KV write, and norms beyond two; in BF16."""
        total = 0.0
        for block, count in self.model.kinds:
            total += count * (block.mixer.row_bytes(self.tp) + block.norms * 4.0 * self.model.hidden)
        return total
