"""What bytes and FLOPs take on one of ``tp`` GPUs, by roofline. Seconds become milliseconds here."""

from __future__ import annotations

from dataclasses import dataclass

from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.models import Model
from mixquant_sglang.tools.plan.rates import ALL_REDUCE_US, LINK, Rates


@dataclass(frozen=True)
class Roofline:
    gpu: Gpu
    model: Model
    tp: int

    @property
    def rates(self) -> Rates:
        return self.gpu.rates

    def peak(self, precision: str) -> float:
        """FLOP/s."""
        return self.gpu.tflops[precision] * 1e12

    def memory(self, bytes_: float, fraction: float) -> float:
        """Milliseconds that ``bytes_`` take at ``fraction`` of the bandwidth."""
        return bytes_ / (self.gpu.bandwidth * fraction) * 1e3

    def all_reduce(self, rows: int) -> float:
        """Milliseconds of two all-reduces per layer over BF16 [rows, hidden]."""
        if self.tp == 1:
            return 0.0
        wire = 2.0 * (self.tp - 1) / self.tp * rows * self.model.hidden * 2 / (self.gpu.link * LINK)
        return 2 * self.model.layers * (wire * 1e3 + ALL_REDUCE_US / 1e3)

    def attention_flops(self, pairs: float) -> float:
        """All layers, for ``pairs`` of a query and a key that it sees."""
        return 4.0 * pairs * self.model.heads / self.tp * self.model.head_dim * self.model.layers
