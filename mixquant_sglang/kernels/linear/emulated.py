"""NVFP4 and FP8 on hardware without tensor cores for them: the same numbers through a BF16 GEMM.

    y[m, n] = alpha_n * sum_k xq[m, k] wq[n, k],   xq, wq exact in BF16

NVFP4: an E2M1 x E4M3 product has at most six significant bits, so codes times block scales are exact in BF16.  A
token's own scale is a power of two and goes into ``xq``; the weight's FP32 tensor scale is alpha, applied to the FP32
accumulator.  Weights stay packed (0.5625 bytes each) and are dequantised just in time.  FP8: E4M3 values are exact in
BF16, both scales are applied to the FP32 sum.  On the CPU the GEMM runs in FP32, which is the reference.

alpha is one number for a GEMM, so ready-made weights whose parts (q, k, v) have different tensor scales take one GEMM
for each, into columns of one result.

Refuses weights whose K is not a multiple of 16.

Rounding happens in the accumulation alone, hence equality with the native kernels up to accumulation order.
Nothing here is faster than BF16: it is for accuracy work and for machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixquant_sglang.formats import fp8, nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.linear.base import PackedLinear, copy_all, refuse_ready


class EmulatedNVFP4(PackedLinear):
    precision = "nvfp4"
    kernel = "emulated"
    activation_format = "qdq"

    def __init__(
        self, weight: torch.Tensor, *, scales: str = "search", ready: Sequence[NVFP4Tensor] | None = None
    ) -> None:
        self._scales = scales
        self._parts = list(ready or [nvfp4.quantize(weight, scales=scales)])
        self._n = weight.shape[0]
        self._set_alphas()

    @classmethod
    def refusal(cls, n: int, k: int) -> str | None:
        return f"K = {k} is not a multiple of the block size 16" if k % 16 else None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for part in self._parts for t in (part.packed, part.block_scales, part.tensor_scale))

    def multiply(self, operand: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        (xq,) = operand
        out = xq.new_empty(xq.shape[0], self._n)
        done = 0
        for part, alpha in zip(self._parts, self._alphas, strict=True):
            columns = out[:, done : done + part.shape[0]]
            done += part.shape[0]
            if xq.is_cuda:
                from mixquant_sglang.kernels.triton.unpack import unscaled

                wq = unscaled(part.packed, part.block_scales)
                # cuBLAS applies alpha to its FP32 accumulator; beta = 0 means that the first argument is never read.
                torch.addmm(columns, xq, wq.t(), beta=0, alpha=alpha, out=columns)
            else:
                columns.copy_(xq.float() @ part.unscaled(torch.float32).t() * alpha)
        return out if bias is None else out.add_(bias)

    def refresh(self, weight: torch.Tensor) -> None:
        # A new tensor scale each time: the one that is there may be lost memory, or far too large for the new weights.
        sizes = [part.shape[0] for part in self._parts]
        self.replace([nvfp4.quantize(rows, scales=self._scales) for rows in torch.split(weight, sizes)])

    @property
    def by_value(self) -> tuple[float, ...]:
        return tuple(self._alphas)

    def replace(self, ready: Sequence[NVFP4Tensor]) -> None:
        copy_all(self.tensors(), tuple(t for p in ready for t in (p.packed, p.block_scales, p.tensor_scale)))
        self._set_alphas()

    def _set_alphas(self) -> None:
        self._alphas = [float(part.tensor_scale) for part in self._parts]


class EmulatedFP8(PackedLinear):
    precision = "fp8"
    kernel = "emulated"

    def __init__(
        self, weight: torch.Tensor, *, scales: str = "search", ready: Sequence[NVFP4Tensor] | None = None
    ) -> None:
        refuse_ready(self.precision, ready)
        self._packed = fp8.quantize(weight)

    @classmethod
    def refusal(cls, n: int, k: int) -> str | None:
        # few_rows.py, which computes the protected rows on a GPU, takes no other; a CPU says the same
        return f"K = {k} is not a multiple of 16" if k % 16 or not k else None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._packed.data, self._packed.scales

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        xq = fp8.quantize_activations(x)
        if x.is_cuda:  # E4M3 is exact in BF16, and tensor cores add in FP32
            codes, weight = xq.data.to(torch.bfloat16), self._packed.data.to(torch.bfloat16)
            total = torch.mm(codes, weight.t(), out_dtype=torch.float32)
        else:
            total = xq.data.to(torch.float32) @ self._packed.data.to(torch.float32).t()
        total = total * xq.scales[:, None] * self._packed.scales[None, :]
        return _finish(total, bias, x.dtype)

    def refresh(self, weight: torch.Tensor) -> None:
        fresh = fp8.quantize(weight)
        copy_all(self.tensors(), (fresh.data, fresh.scales))


def _finish(total: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = total.to(dtype)
    return out if bias is None else out + bias
