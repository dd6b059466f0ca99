"""FP8 on hardware without tensor cores for it: the same numbers through a BF16 GEMM.

    y[m, n] = sx[m] * sw[n] * sum_k xq[m, k] wq[n, k],   xq, wq exact in BF16

E4M3 values are exact in BF16, both scales are applied to the FP32 sum.  On the CPU the GEMM runs in FP32, which is the
reference.  Rounding happens in the accumulation alone, hence equality with the native kernels up to accumulation order.
Nothing here is faster than BF16: it is for accuracy work and for machines without a GPU.  Where a row's bits must not
depend on the number of rows, a GPU takes ``triton/invariant.py``: cuBLAS chooses by it, and what SGLang puts in its
place for deterministic inference rounds before the scales (0.5.17).
SGLang's Marlin FP8 leaves activations in BF16: ``docs/kernels.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixquant_sglang.formats import fp8
from mixquant_sglang.formats.fp8 import FP8Tensor
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.linear.base import PackedLinear, Piece, copy_all, pieces


class EmulatedFP8(PackedLinear):
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
        self._packed = fp8.quantize(weight) if ready is None else joined(ready)
        self._invariant = environment.invariant

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._packed.data, self._packed.scales

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        xq = fp8.quantize_activations(x)
        if x.is_cuda:  # E4M3 is exact in BF16, and tensor cores add in FP32
            codes, weight = xq.data.to(torch.bfloat16), self._packed.data.to(torch.bfloat16)
            if self._invariant:
                from mixquant_sglang.kernels.triton import invariant

                return invariant.scaled_mm(codes, weight, xq.scales[:, None], self._packed.scales, bias)
            total = torch.mm(codes, weight.t(), out_dtype=torch.float32)
        else:
            total = xq.data.to(torch.float32) @ self._packed.data.to(torch.float32).t()
        total = total * xq.scales[:, None] * self._packed.scales[None, :]
        return _finish(total, bias, x.dtype)

    def refresh(self, weight: torch.Tensor) -> None:
        fresh = fp8.quantize(weight)
        copy_all(self.tensors(), (fresh.data, fresh.scales))

    def replace(self, ready: Sequence[Piece]) -> None:
        fresh = joined(ready)
        copy_all(self.tensors(), (fresh.data, fresh.scales))


def joined(ready: Sequence[Piece]) -> FP8Tensor:
    """Rows of FP8 in one: each has its scale."""
    found = pieces(ready, FP8Tensor, "fp8")
    if len(found) == 1:
        return found[0]
    codes = torch.cat([piece.data.view(torch.uint8) for piece in found]).view(torch.float8_e4m3fn)
    return FP8Tensor(codes, torch.cat([piece.scales for piece in found]))


def _finish(total: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = total.to(dtype)
    return out if bias is None else out + bias
