"""What bytes and FLOPs take on one of ``tp`` GPUs, by roofline. Seconds become milliseconds here."""

from __future__ import annotations

from dataclasses import dataclass

from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.rates import ALL_REDUCE_US, LINK, Rates
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.mixers import Attention, DeltaRule, Mixer


@dataclass(frozen=True)
class Roofline:
    gpu: Gpu
    model: Decoder
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

    def attention_rate(self, mixer: Mixer) -> float:
        """FLOP/s of softmax attention over pages; windows run on slower kernels, and so does the whole of a model with
        wide heads."""
        fraction = self.rates.windowed if mixer.window else self.rates.attention
        return self.peak("bf16") * (self.rates.wide if self.wide_heads else fraction)

    @property
    def wide_heads(self) -> bool:
        """Whether some are wider than FlashAttention 3 takes."""
        return any(isinstance(one.mixer, Attention) and one.mixer.head_dim > 256 for one, _ in self.model.kinds)

    def gathered(self, mixer: Attention, slowed: float) -> float:
        """Milliseconds of attention of gathered keys; ``slowed``: pairs, each over its fraction of the peak."""
        return slowed * mixer.pair_flops(self.tp) / self.peak("bf16") * 1e3

    def gather(self, mixer: Attention, tokens: int, passes: int) -> float:
        """Milliseconds that one layer takes to copy keys and values of ``tokens`` out of their pages."""
        return (
            self.memory(2.0 * tokens * mixer.kv_bytes(self.tp), self.rates.copy) + passes * self.rates.gather_us / 1e3
        )

    def recurrence(self, rows: float) -> tuple[float, float]:
        """(milliseconds, FLOPs) of the gated delta rule over ``rows`` tokens in all blocks that have it."""
        flops = 0.0
        for block, count in self.model.kinds:
            if isinstance(block.mixer, DeltaRule):
                flops += count * rows * block.mixer.row_flops(self.tp)
        return flops / (self.peak("bf16") * self.rates.recurrent) * 1e3, flops
