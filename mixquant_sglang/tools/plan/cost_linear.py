"""What a linear costs in one pass: its GEMM, and what quantises its input."""

from __future__ import annotations

from dataclasses import dataclass

from mixquant_sglang.kernels.limits import FEW_ROWS, WIDE
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY, stored
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.rates import at
from mixquant_sglang.tools.plan.roofline import Roofline
from mixquant_sglang.weights.footprint import Placed

WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}  # per element, block scales included
INPUT_BYTES = {"bf16": 2.0, "qdq": 2.0, "fp8": 1.0, "nvfp4": 0.5625}
# What writes a linear's input, and the bytes per element of it that this moves beside the result itself.
# Shared experts read the norm of the routed ones, and kv_a_proj, in_proj_ba and routers that of a linear beside them.
_BEFORE = {
    **{"self_attn.qkv_proj": "norm", "mlp.gate_up_proj": "norm", "mlp.down_proj": "silu"},
    **{"linear_attn.in_proj_qkvz": "norm", "linear_attn.out_proj": "silu"},  # RMSNorm, gated by z
    **{"self_attn.fused_qkv_a_proj_with_mqa": "norm", "self_attn.q_b_proj": "norm", "self_attn.q_proj": "norm"},
    **{f"mlp.{shared}.down_proj": "silu" for shared in ("shared_expert", "shared_experts")},
    **{"feed_forward.gate_up_proj": "norm", "feed_forward.down_proj": "silu"},
    **{"feed_forward.shared_expert.down_proj": "silu", "mlp.fc1": "norm", "mlp.c_fc": "norm"},
}
_BEFORE_BYTES = {"norm": 6.0, "silu": 4.0}  # x, the residual and its new value; gate and up


@dataclass(frozen=True)
class LinearCost:
    """All ``linear.count`` of one shape; ``precision`` and ``emulated`` are those of the pass."""

    roof: Roofline
    plan: Plan
    linear: Placed

    def gemm(self, precision: str, emulated: bool, rows: int, memory: float) -> tuple[float, float]:
        """(milliseconds, bytes); ``memory``: the fraction of the bandwidth that its operands get."""
        run = "bf16" if emulated or precision in WEIGHT_ONLY else precision
        # Few rows read weights as they are packed; for others they are unpacked before.
        read = stored(precision) if precision in WEIGHT_ONLY and not emulated and rows <= WIDE else run
        rates, linear = self.roof.rates, self.linear
        n, k = linear.n, linear.k
        moved = linear.count * (rows * k * INPUT_BYTES[run] + n * k * WEIGHT_BYTES[read] + rows * n * 2.0)
        flops = linear.count * 2.0 * rows * n * k
        curve = rates.gemm[run]
        if emulated and precision == "nvfp4":
            curve = rates.gemm.get("qdq", curve)
        if self.plan.stock:
            curve = rates.stock_gemm.get(run, curve)
        compute = flops / (self.roof.peak(run) * at(curve, rows)) * 1e3
        if read != run:  # a kernel of ours, which turns what it reads into BF16
            return max(compute, self.roof.memory(moved, at(rates.packed[precision], rows))), moved
        return max(compute, self.roof.memory(moved, memory)), moved

    def conversions(self, precision: str, emulated: bool, rows: int, fused: bool) -> tuple[float, float]:
        """(activation quantiser, weight dequantiser), milliseconds; without what ``before`` does in passing."""
        if precision == "bf16":
            return 0.0, 0.0
        roof, rates, linear = self.roof, self.roof.rates, self.linear
        if precision in WEIGHT_ONLY:
            unpacked = linear.count * linear.n * linear.k * (WEIGHT_BYTES[stored(precision)] + 2)
            return 0.0, roof.memory(unpacked, rates.dequantise) if emulated or rows > WIDE else 0.0
        elements = linear.count * rows * linear.k
        form = format_of(precision, emulated)
        fraction = at(rates.quantise["alone"][form], rows)
        quantise = dequantise = 0.0
        if form == "nvfp4" and not self.plan.stock:
            quantise = roof.memory(linear.count * rows * linear.n * 4.0, rates.copy)  # by row, behind the GEMM
            if not self.plan.fused:
                quantise += roof.memory(elements * 6.0, rates.copy)  # the row scales, and x by them
        if self.plan.stock or (form == "nvfp4" and not self.plan.fused):
            fraction = rates.stock_quantise[form]
        if not fused or linear.name not in _BEFORE:
            quantise += roof.memory(elements * (2 + INPUT_BYTES[form]), fraction)
        if emulated:
            weights = linear.count * linear.n * linear.k * (WEIGHT_BYTES[precision] + 2)
            dequantise = roof.memory(weights, rates.dequantise)
        return quantise, dequantise

    def before(self, form: str, rows: int) -> tuple[float, float]:
        """(milliseconds, bytes) of the norm or SiLU that writes the input as ``form``, and of the copy of q behind
        qkv_proj."""
        roof, linear = self.roof, self.linear
        ms = moved = 0.0
        before = _BEFORE.get(linear.name)
        if before:
            moved = linear.count * rows * linear.k * (_BEFORE_BYTES[before] + INPUT_BYTES[form])
            fraction = roof.rates.copy if form == "bf16" else at(roof.rates.quantise[before][form], rows)
            ms = roof.memory(moved, fraction)
        q = linear.queries
        if q and not (form == "fp8" and q % 64 == 0):
            copied = linear.count * rows * q * 4.0
            ms, moved = ms + roof.memory(copied, roof.rates.q_copy), moved + copied
        return ms, moved

    def protected(self, rows: int) -> tuple[float, float]:
        """(milliseconds, bytes): launched in every pass from a graph, the kernel reads the weights for protected rows
        alone; more of them than it takes are a GEMM of their own, which costs no less."""
        roof, rates, linear = self.roof, self.roof.rates, self.linear
        if not rows:
            return linear.count * rates.idle_linear_us / 1e3, 0.0
        weights = linear.count * linear.n * linear.k * WEIGHT_BYTES[stored(linear.decode)]
        few, fractions = rates.protected
        read = roof.memory(weights, fractions[rows > few])
        if linear.decode in WEIGHT_ONLY and linear.decode not in self.plan.emulated:
            some, sixteen = rates.placed[linear.decode]
            return roof.memory(weights, some if rows <= 8 else sixteen) * -(-rows // 16), weights
        if rows <= FEW_ROWS:
            return read, weights
        ms, moved = self.gemm(linear.decode, linear.decode in self.plan.emulated, rows, rates.copy)
        return max(ms, read), moved


def format_of(precision: str, emulated: bool) -> str:
    """That of the activations: BF16 is what an emulated GEMM takes."""
    return "qdq" if emulated else precision
