"""FP8 weights in blocks of 128 x 128 and BF16 activations, on the bytes of ``fp8_blocks.py``.

    y[m, n] = sum_b sw[n // 128, b] * sum_{k in b} x[m, k] wq[n, k] (+ bias[n]),   wq exact in BF16

FP32 sums, one rounding to BF16: activations are not quantised.
"""

from __future__ import annotations

from typing import Any

import torch

from mixquant_sglang.formats.fp8_blocks import FP8Blocks
from mixquant_sglang.kernels.linear.base import PackedLinear
from mixquant_sglang.kernels.linear.fp8_blocks import EmulatedBlockFP8
from mixquant_sglang.kernels.linear.w4a16 import joined
from mixquant_sglang.kernels.linear.weight_only import WeightOnly


class EmulatedBlockW8A16(WeightOnly):
    """With torch alone, in FP32."""

    precision = "w8a16"
    kernel = "emulated"
    _base: EmulatedBlockFP8

    @classmethod
    def packed(cls, *args: Any, **kwargs: Any) -> PackedLinear:
        return EmulatedBlockFP8(*args, **kwargs)

    def adopt(self, base: PackedLinear) -> None:
        if not isinstance(base, EmulatedBlockFP8):
            raise TypeError(f"this reads FP8 weights in blocks, not those of {type(base).__name__}")
        super().adopt(base)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return joined(self._base.parts, bias, lambda part, b: self._multiply(x, part, b))

    def _multiply(self, x: torch.Tensor, part: FP8Blocks, bias: torch.Tensor | None) -> torch.Tensor:
        total = x.float() @ part.dequantize(torch.float32).t()
        return (total if bias is None else total + bias).to(x.dtype)


class NativeBlockW8A16(EmulatedBlockW8A16):
    """By ``triton/block_rows.py``, for any number of rows."""

    kernel = "native"

    @property
    def places(self) -> bool:  # type: ignore[override]
        return len(self._base.parts) == 1

    def place(
        self,
        out: torch.Tensor,
        index: torch.Tensor,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        rest: torch.Tensor | None = None,
    ) -> None:
        from mixquant_sglang.kernels.triton.block_rows import block_rows

        (part,) = self._base.parts
        block_rows(rows, part.data, part.scales, bias, out=out, index=index, rest=rest)

    def _multiply(self, x: torch.Tensor, part: FP8Blocks, bias: torch.Tensor | None) -> torch.Tensor:
        from mixquant_sglang.kernels.triton.block_rows import block_rows

        return block_rows(x, part.data, part.scales, bias)
