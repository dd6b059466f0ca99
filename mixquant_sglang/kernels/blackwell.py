"""NVFP4 on tensor cores (SM100 and newer) by composing SGLang's own FP4 linear method on a shadow of the weight.

The shadow is a bare module that holds what a ModelOpt NVFP4 checkpoint would: ``weight`` (codes, low nibble first),
``weight_scale`` (E4M3 per 16), ``weight_scale_2`` (FP32) and ``input_scale`` = 1.  SGLang's method pads, swizzles and
multiplies with whichever FP4 GEMM ``--fp4-gemm-backend`` selects.

SGLang's activation scale is static per tensor.  Ours is per token and a power of two, so it stays outside:

    y[m] = 2^k_m * fp4_linear(x[m] * 2^-k_m),   2^k_m from ``formats.nvfp4.row_scales``

Both multiplications are exact in BF16, no token depends on another, and the numbers are those of the emulated kernel.

Refuses GPUs below SM100 (flashinfer's FP4 quantiser runs there without an error and writes nothing valid; SGLang's own
FP4 method would fall back to Marlin, which leaves activations unquantised) and K that is no multiple of 16.
This kernel has not run on a Blackwell GPU: what is tested are the bytes, layouts, shapes and refusals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels.base import PackedLinear

# Makes SGLang's FP4 linear method; compat.py sets it, since this package never imports sglang.
fp4_linear_method: Callable[[], Any] | None = None


class NativeNVFP4(PackedLinear):
    precision = "nvfp4"
    kernel = "native"

    def __init__(self, weight: torch.Tensor, *, scales: str = "search") -> None:
        if fp4_linear_method is None:
            raise MixQuantError("the native nvfp4 kernel needs SGLang's FP4 linear method, which was not provided")
        self._method = fp4_linear_method()
        self._scales = scales
        self._n, self._k = weight.shape
        self._shadow = self._pack(weight)

    @classmethod
    def refusal(cls, n: int, k: int) -> str | None:
        return f"K = {k} is not a multiple of the block size 16" if k % 16 else None

    def _pack(self, weight: torch.Tensor) -> torch.nn.Module:
        packed = nvfp4.quantize(weight, scales=self._scales)
        shadow = torch.nn.Module()
        with torch.device(weight.device):
            self._method.create_weights(shadow, self._k, [self._n], self._k, self._n, weight.dtype, weight_loader=None)
        for name, value in (
            ("weight", packed.packed),
            ("weight_scale", packed.block_scales),
            ("weight_scale_2", packed.tensor_scale),
            ("input_scale", torch.ones_like(packed.tensor_scale)),
        ):
            parameter = getattr(shadow, name)
            parameter.data.copy_(value.expand_as(parameter) if value.dim() == 0 else value)
        self._method.process_weights_after_loading(shadow)
        return shadow

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(dict(self._shadow.named_parameters()).values())

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, self._n)
        row_scales = nvfp4.row_scales(x)
        out: torch.Tensor = self._method.apply(self._shadow, x * row_scales.reciprocal()[:, None].to(x.dtype), None)
        out = out * row_scales[:, None].to(out.dtype)
        return out if bias is None else out + bias

    def refresh(self, weight: torch.Tensor) -> bool:
        fresh = dict(self._pack(weight).named_parameters())
        for name, parameter in self._shadow.named_parameters():
            parameter.data.copy_(fresh[name])
        return True
