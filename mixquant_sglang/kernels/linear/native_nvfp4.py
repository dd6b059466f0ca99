"""NVFP4 on tensor cores (SM100 and newer) by composing SGLang's own FP4 linear method on a shadow of the weight.

The shadow is a bare module that holds what a ModelOpt NVFP4 checkpoint would: ``weight`` (codes, low nibble first),
``weight_scale`` (E4M3 per 16), ``weight_scale_2`` (FP32) and ``input_scale`` = 1.  SGLang's method pads, swizzles and
multiplies with whichever FP4 GEMM ``--fp4-gemm-backend`` selects.

SGLang's activation scale is static per tensor.  Ours is per token and a power of two, so it stays outside:

    y[m] = 2^k_m * fp4_linear(x[m] * 2^-k_m),   2^k_m from ``formats.nvfp4.row_scales``

Both multiplications are exact in BF16, no token depends on another, and the numbers are those of the emulated kernel.
Ready-made weights whose parts (q, k, v) have different tensor scales take one shadow and one GEMM for each part.

Who quantises the activations (``Environment.own_quantizer``; every K that can be packed suits both):

  ours (the default)   ``kernels/operands.py``, alone or fused into the norm or SiLU before; SGLang's method gets
                       codes and scales as the pair that it takes from its own fused kernels
                       (``_accepts_prequantized_fp4``), and pads them like those of its own quantiser
  FlashInfer's         with ``prefill: {fuse: false}`` in the recipe: SGLang's method gets BF16 for ``fp4_quantize``

Which is faster was not measured: ours saves writing and reading BF16 and the pass that multiplies by 2^-k_m.

Refuses GPUs below SM100 (flashinfer's FP4 quantiser runs there without an error and writes nothing valid; SGLang's own
FP4 method would fall back to Marlin, which leaves activations unquantised) and K that is no multiple of 16.
This kernel has not run on a Blackwell GPU: what is tested are the bytes, layouts, shapes and refusals.
Per-row alpha in FlashInfer's ``mm_fp4`` (0.7.2), and its quantiser with a scale for each token: ``docs/kernels.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.linear.base import PackedLinear, Piece, copy_all, pieces
from mixquant_sglang.kernels.packing import quantize_nvfp4


class NativeNVFP4(PackedLinear):
    precision = "nvfp4"
    kernel = "native"

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scales: str = "search",
        ready: Sequence[Piece] | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        if environment.fp4_linear_method is None:
            raise MixQuantError("the native nvfp4 kernel needs SGLang's FP4 linear method, which was not provided")
        self.activation_format = "nvfp4" if environment.own_quantizer else None
        self._method = environment.fp4_linear_method()
        self._scales = scales
        self._dtype = weight.dtype
        self._n, self.k = weight.shape
        own = [quantize_nvfp4(weight, scales=scales)] if ready is None else ready
        parts = pieces(own, NVFP4Tensor, self.precision)
        self._sizes = [part.shape[0] for part in parts]
        self._shadows = [self._shadow(part) for part in parts]

    def _shadow(self, packed: NVFP4Tensor) -> torch.nn.Module:
        shadow = torch.nn.Module()
        shadow._accepts_prequantized_fp4 = True  # type: ignore[assignment]
        n, k = packed.shape
        with torch.device(packed.packed.device):
            self._method.create_weights(shadow, k, [n], k, n, self._dtype, weight_loader=None)
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
        return tuple(parameter for shadow in self._shadows for parameter in shadow.parameters())

    @property
    def gemm_shapes(self) -> tuple[tuple[int, int], ...]:
        """[N, K] of each GEMM, as padded."""
        weights: list[torch.Tensor] = [shadow.weight for shadow in self._shadows]  # type: ignore[misc]
        return tuple((weight.shape[0], 2 * weight.shape[1]) for weight in weights)

    def multiply(self, operand: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        codes, scales, row_scales = operand
        # as FlashInfer's quantiser returns them: SGLang asserts uint8 codes, and its GEMMs read scales as bytes
        return self._linear((codes, scales.view(torch.uint8)), row_scales, bias)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.activation_format is not None:
            return super().matmul(x, bias)
        row_scales = nvfp4.row_scales(x)
        return self._linear(x * row_scales.reciprocal()[:, None].to(x.dtype), row_scales, bias)

    def _linear(
        self, x: torch.Tensor | tuple[torch.Tensor, torch.Tensor], row_scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if len(row_scales) == 0:
            return torch.empty((0, self._n), dtype=self._dtype, device=row_scales.device)
        parts: list[torch.Tensor] = [self._method.apply(shadow, x, None) for shadow in self._shadows]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if out.is_cuda:
            from mixquant_sglang.kernels.triton.rows import scale_rows_

            scale_rows_(out, row_scales)
        else:
            out *= row_scales[:, None].to(out.dtype)
        return out if bias is None else out.add_(bias)

    def refresh(self, weight: torch.Tensor) -> None:
        self.replace([quantize_nvfp4(rows, scales=self._scales) for rows in torch.split(weight, self._sizes)])

    def replace(self, ready: Sequence[Piece]) -> None:
        parts = pieces(ready, NVFP4Tensor, self.precision)
        fresh = tuple(parameter.data for part in parts for parameter in self._shadow(part).parameters())
        copy_all(tuple(parameter.data for parameter in self.tensors()), fresh)
