"""FP8 weights and BF16 activations, on the bytes that the FP8 kernels pack and multiply by.

    y[m, n] = sw[n] * sum_k x[m, k] wq[n, k] (+ bias[n]),   wq exact in BF16

One FP32 sum, one rounding to BF16: activations are not quantised, so nothing but the weights is rounded.
SGLang's W8A16 is Marlin's, with weights in a layout of its own: ``docs/kernels.md``.
"""

from __future__ import annotations

from typing import Any

import torch

from mixquant_sglang.kernels.limits import WIDE
from mixquant_sglang.kernels.linear.base import PackedLinear
from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8
from mixquant_sglang.kernels.linear.weight_only import WeightOnly, chunked, locks, widened


class EmulatedW8A16(WeightOnly):
    """With torch alone."""

    precision = "w8a16"
    kernel = "emulated"

    @classmethod
    def packed(cls, *args: Any, **kwargs: Any) -> PackedLinear:
        return EmulatedFP8(*args, **kwargs)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        codes, scales = self.tensors()
        return chunked(x, bias, lambda rows, b: widened(rows, codes.to(torch.bfloat16), scales, b))


class NativeW8A16(EmulatedW8A16):
    """On CUDA by ``triton/packed_rows.py``, up to ``WIDE`` rows."""

    kernel = "native"
    places = True

    def adopt(self, base: PackedLinear) -> None:
        super().adopt(base)
        self._locks = locks(self.tensors()[0].device)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) > WIDE:
            return super().matmul(x, bias)
        from mixquant_sglang.kernels.triton.packed_rows import linear_rows

        return linear_rows(x, self._weight(), bias)

    def place(
        self,
        out: torch.Tensor,
        index: torch.Tensor,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        rest: torch.Tensor | None = None,
    ) -> None:
        from mixquant_sglang.kernels.triton.packed_rows import linear_rows

        linear_rows(rows, self._weight(), bias, out=out, index=index, rest=rest)

    def _weight(self) -> Any:
        from mixquant_sglang.kernels.triton.packed_rows import Packed

        codes, scales = self.tensors()
        return Packed(codes, scales, self._locks)
