"""What the experts of a block cost in one pass: grouped GEMMs, the rows that are moved for them, their quantisers.

T tokens make A = T k / ep rows for one rank's E / ep experts. Its GEMMs take

    max(6 A I H / (peak * fraction(precision, T k / E)), (E / ep) (1 - (1 - k / E)^T) 3 I H bytes / bandwidth),

the second being the weights of the experts that some token reaches, if the router spreads tokens evenly. SGLang's
``fused_experts`` writes a row of 2 I, I and H numbers for each of the A rows, and reads it; our kernels leave out the
first ("move").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mixquant_sglang.kernels.limits import PIECES
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY, stored
from mixquant_sglang.tools.plan.cost_linear import INPUT_BYTES, WEIGHT_BYTES, format_of
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.rates import ExpertRates, Sourced, at
from mixquant_sglang.tools.plan.roofline import Roofline
from mixquant_sglang.weights.decoder import Experts
from mixquant_sglang.weights.footprint import Placed


def rate_of(rates: ExpertRates, precision: str, emulated: bool, stock: bool) -> Sourced:
    """That of the grouped GEMMs."""
    if precision in WEIGHT_ONLY:
        return replace(rates.gemm["bf16"], source="predicted: BF16's rate, and the bytes of packed weights")
    rate = rates.gemm["qdq" if emulated else precision]
    return rates.stock.get(precision, rate) if stock else rate


def _unpacks(precision: str, tokens: int) -> bool:
    """Whether weights are unpacked for so many BF16 rows."""
    return precision == "w4a16" and tokens > PIECES


@dataclass(frozen=True)
class ExpertCost:
    """All ``placed.count`` blocks alike; ``precision`` and ``emulated`` are those of the pass."""

    roof: Roofline
    plan: Plan
    placed: Placed
    experts: Experts

    def rows(self, tokens: float) -> float:
        """Rows of all experts of this rank together, in one block."""
        return tokens * self.experts.top_k * self.placed.copies / self.experts.count

    def flops(self, tokens: float) -> float:
        return self.placed.count * self.rows(tokens) * 3.0 * self.placed.n * self.placed.k

    def weights(self, precision: str, tokens: float) -> float:
        """Bytes of the experts that ``tokens`` reach."""
        one = 1.5 * self.placed.n * self.placed.k * WEIGHT_BYTES[stored(precision)]
        return self.placed.count * one * self.experts.distinct(tokens) * self.placed.copies / self.experts.count

    def gemm(self, precision: str, emulated: bool, tokens: int) -> tuple[float, float]:
        """(milliseconds, bytes) of both GEMMs."""
        run, rates = "bf16" if emulated or precision in WEIGHT_ONLY else precision, self.roof.rates.experts
        rate = rate_of(rates, precision, emulated, self.plan.stock)
        each = round(tokens * self.experts.top_k / self.experts.count)
        compute = self.flops(tokens) / (self.roof.peak(run) * at(rate.curve, max(1, each))) * 1e3
        # As they are packed, but for many rows of NVFP4, which is unpacked before.
        packed = precision in WEIGHT_ONLY and not emulated and not _unpacks(precision, tokens)
        moved = self.weights(precision if packed else run, tokens)
        return max(compute, self.roof.memory(moved, rates.read[run])), moved

    def move(self, precision: str, tokens: int) -> tuple[float, float]:
        """(milliseconds, bytes) of the caches with a row for each token and expert: our kernels apply the activation
        before they write."""
        inner = self.placed.n // 2
        numbers = (3 if precision == "bf16" or self.plan.stock else 1) * inner + self.placed.k
        moved = self.placed.count * self.rows(tokens) * numbers * 4.0
        return self.roof.memory(moved, self.roof.rates.experts.move), moved

    def norm(self, tokens: int) -> tuple[float, float]:
        """(milliseconds, bytes) of the norm in front, in BF16."""
        moved = self.placed.count * tokens * self.placed.k * 8.0
        return self.roof.memory(moved, self.roof.rates.copy), moved

    def conversions(self, precision: str, emulated: bool, tokens: int) -> tuple[float, float]:
        """(activation quantisers, weight dequantiser), milliseconds: the tokens, and the rows between the GEMMs."""
        if precision == "bf16":
            return 0.0, 0.0
        if precision in WEIGHT_ONLY:
            unpacked = emulated or _unpacks(precision, tokens)
            return 0.0, self._dequantise(stored(precision)) if unpacked else 0.0
        form, rates, quantise = format_of(precision, emulated), self.roof.rates, 0.0
        for rows, width in ((tokens, self.placed.k), (round(self.rows(tokens)), self.placed.n // 2)):
            fraction = (
                rates.stock_quantise[form] if self.plan.stock else at(rates.quantise["alone"][form], max(1, rows))
            )
            quantise += self.roof.memory(self.placed.count * rows * width * (2 + INPUT_BYTES[form]), fraction)
        return quantise, self._dequantise(precision) if emulated else 0.0

    def _dequantise(self, precision: str) -> float:
        weights = self.placed.count * self.placed.copies * 1.5 * self.placed.n * self.placed.k
        return self.roof.memory(weights * (WEIGHT_BYTES[precision] + 2), self.roof.rates.dequantise)

    def protected(self, tokens: int) -> tuple[float, float]:
        """(milliseconds, bytes): a run in the decode precision over the protected rows. Unused slots of a captured
        graph read no expert, so without any rows it is the launches."""
        launches = self.placed.count * self.roof.rates.experts.block_us / 1e3
        if not tokens:
            return launches, 0.0
        precision = self.placed.decode
        emulated = precision in self.plan.emulated
        ms, moved = self.gemm(precision, emulated, tokens)
        return ms + launches + self.move(precision, tokens)[0] + sum(
            self.conversions(precision, emulated, tokens)
        ), moved
