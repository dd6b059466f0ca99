"""NVFP4 and FP8 on hardware without tensor cores for them: the same numbers through a BF16 GEMM.

    y[m, n] = alpha_n * sum_k xq[m, k] wq[n, k],   xq, wq exact in BF16

NVFP4: an E2M1 x E4M3 product has at most six significant bits, so codes times block scales are exact in BF16.  A
token's own scale is a power of two and goes into ``xq``; the weight's FP32 tensor scale is alpha, applied to the FP32
accumulator.  Weights stay packed (0.5625 bytes each) and are dequantised just in time.  FP8: E4M3 values are exact in
BF16, both scales are applied to the FP32 sum.  On the CPU the GEMM runs in FP32, which is the reference.

Rounding happens in the accumulation alone, hence equality with the native kernels up to accumulation order.
Nothing here is faster than BF16: it is for accuracy work and for machines without a GPU.
"""

from __future__ import annotations

import torch

from mixquant_sglang.formats import fp8, nvfp4
from mixquant_sglang.kernels.base import PackedLinear, copy_all


class EmulatedNVFP4(PackedLinear):
    precision = "nvfp4"
    kernel = "emulated"
    activation_format = "qdq"

    def __init__(self, weight: torch.Tensor, *, scales: str = "search") -> None:
        self._scales = scales
        self._packed = nvfp4.quantize(weight, scales=scales)
        self._set_alpha()

    @classmethod
    def refusal(cls, n: int, k: int) -> str | None:
        return f"K = {k} is not a multiple of the block size 16" if k % 16 else None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._packed.packed, self._packed.block_scales, self._packed.tensor_scale

    def multiply(self, operand: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        (xq,) = operand
        if xq.is_cuda:
            from mixquant_sglang.kernels.triton import nvfp4 as triton_nvfp4

            wq = triton_nvfp4.unscaled(self._packed.packed, self._packed.block_scales)
            out = xq.new_empty(xq.shape[0], wq.shape[0])
            # cuBLAS applies alpha to its FP32 accumulator; beta = 0 means that the first argument is never read.
            torch.addmm(out, xq, wq.t(), beta=0, alpha=self._alpha, out=out)
            return out if bias is None else out.add_(bias)
        total = xq.float() @ self._packed.unscaled(torch.float32).t() * self._alpha
        return _finish(total, bias, xq.dtype)

    def refresh(self, weight: torch.Tensor) -> bool:
        # Captured graphs hold alpha by value, so the tensor scale stays as long as the new weights fit into its range.
        fits = float(weight.abs().max()) <= self._range
        fresh = nvfp4.quantize(weight, scales=self._scales, tensor_scale=self._packed.tensor_scale if fits else None)
        copy_all(self.tensors(), (fresh.packed, fresh.block_scales, fresh.tensor_scale))
        self._set_alpha()
        return fits

    def _set_alpha(self) -> None:
        self._alpha = float(self._packed.tensor_scale)
        self._range = self._alpha * nvfp4.E2M1_MAX * nvfp4.E4M3_MAX


class EmulatedFP8(PackedLinear):
    precision = "fp8"
    kernel = "emulated"

    def __init__(self, weight: torch.Tensor, *, scales: str = "search") -> None:
        self._packed = fp8.quantize(weight)

    @classmethod
    def refusal(cls, n: int, k: int) -> str | None:
        return None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._packed.data, self._packed.scales

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        xq = fp8.quantize_activations(x)
        total = xq.data.to(torch.float32) @ self._packed.data.to(torch.float32).t()
        total = total * xq.scales[:, None] * self._packed.scales[None, :]
        return _finish(total, bias, x.dtype)

    def refresh(self, weight: torch.Tensor) -> bool:
        fresh = fp8.quantize(weight)
        copy_all(self.tensors(), (fresh.data, fresh.scales))
        return True


def _finish(total: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = total.to(dtype)
    return out if bias is None else out + bias
