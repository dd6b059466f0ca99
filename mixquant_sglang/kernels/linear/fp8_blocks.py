"""FP8 weights with a scale for each block of 128 x 128, from checkpoints that have them (``weight_scale_inv``).

    y[m, n] = sum_b sx[m, b] * sw[n // 128, b] * sum_{k in b} xq[m, k] wq[n, k],   xq, wq in E4M3

Activations have a scale for each token and 128 columns (``formats/fp8_blocks.py``), as in SGLang's block FP8 linears:
the native kernel is SGLang's own, and so is its quantiser.  The emulated one sums dequantised numbers in FP32, which
is the reference.

Parts of a fused linear (q, k, v) whose rows are no multiple of 128 have blocks of their own, and stay parts with a GEMM
each.  Refused: K that is no multiple of 128, which no quantiser of such activations takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixquant_sglang.formats import fp8_blocks
from mixquant_sglang.formats.fp8_blocks import FP8Blocks
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.linear.base import PackedLinear, Piece, copy_all, pieces


class EmulatedBlockFP8(PackedLinear):
    """With torch alone."""

    precision = "fp8"
    kernel = "emulated"

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scales: str = "search",
        ready: Sequence[Piece] | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        if ready is None:
            raise ValueError("FP8 weights in blocks come from a checkpoint that has them: nothing packs them")
        self._parts = pieces(ready, FP8Blocks, "fp8 in blocks")

    @property
    def parts(self) -> Sequence[FP8Blocks]:
        """Rows in order, each with blocks of its own."""
        return self._parts

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for part in self._parts for t in (part.data, part.scales))

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        values = fp8_blocks.quantize_activations(x).dequantize()
        made = [values @ part.dequantize(torch.float32).t() for part in self._parts]
        out = torch.cat(made, dim=1).to(x.dtype)
        return out if bias is None else out + bias

    def refresh(self, weight: torch.Tensor) -> None:
        raise ValueError("FP8 weights in blocks come from a checkpoint that has them: send its tensors, not BF16")

    def replace(self, ready: Sequence[Piece]) -> None:
        fresh = pieces(ready, FP8Blocks, "fp8 in blocks")
        copy_all(self.tensors(), tuple(t for part in fresh for t in (part.data, part.scales)))


class NativeBlockFP8(EmulatedBlockFP8):
    """By the linear of SGLang that ``environment`` has."""

    kernel = "native"

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scales: str = "search",
        ready: Sequence[Piece] | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        super().__init__(weight, scales=scales, ready=ready, environment=environment)
        assert environment.fp8_block_linear is not None, "SGLang's linear for such weights was not asked for"
        self._linear = environment.fp8_block_linear

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) == 0:
            return x.new_empty(0, sum(part.shape[0] for part in self._parts))
        made = [self._linear(x, part.data, part.scales) for part in self._parts]
        out = made[0] if len(made) == 1 else torch.cat(made, dim=1)
        return out if bias is None else out + bias
