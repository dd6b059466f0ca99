"""NVFP4 on hardware without tensor cores for it: the same numbers through a BF16 GEMM.

    y[m, n] = alpha_n * sum_k xq[m, k] wq[n, k],   xq, wq exact in BF16

An E2M1 x E4M3 product has at most six significant bits, so codes times block scales are exact in BF16.  A
token's own scale is a power of two and goes into ``xq``; the weight's FP32 tensor scale is alpha, applied to the FP32
accumulator.  Weights stay packed (0.5625 bytes each) and are dequantised just in time.  On the CPU the GEMM runs in
FP32, which is the reference.

alpha is one number for a GEMM, so ready-made weights whose parts (q, k, v) have different tensor scales take one GEMM
for each, into columns of one result.

Refuses weights whose K is not a multiple of 16.

Rounding happens in the accumulation alone, hence equality with the native kernels up to accumulation order.
Nothing here is faster than BF16: it is for accuracy work and for machines without a GPU.  Where a row's bits must not
depend on the number of rows, a GPU takes ``triton/invariant.py``: cuBLAS chooses by it.
SGLang's Marlin FP4 and FlashInfer's ``mm_bf16_fp4`` leave activations in BF16: ``docs/kernels.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.linear.base import PackedLinear, Piece, copy_all, pieces
from mixquant_sglang.kernels.packing import quantize_nvfp4


class EmulatedNVFP4(PackedLinear):
    precision = "nvfp4"
    kernel = "emulated"
    activation_format = "qdq"

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scales: str = "search",
        ready: Sequence[Piece] | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        self._scales = scales
        self._invariant = environment.invariant
        own = [quantize_nvfp4(weight, scales=scales)] if ready is None else ready
        self._parts = pieces(own, NVFP4Tensor, self.precision)
        self._n = sum(part.shape[0] for part in self._parts)
        self._set_alphas()

    @property
    def parts(self) -> Sequence[NVFP4Tensor]:
        """Rows in order, a piece for each tensor scale."""
        return self._parts

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
                if self._invariant:
                    from mixquant_sglang.kernels.triton import invariant

                    invariant.scaled_mm(xq, wq, None, part.tensor_scale.reshape(1).expand(len(wq)), out=columns)
                    continue
                # cuBLAS applies alpha to its FP32 accumulator; beta = 0 means that the first argument is never read.
                torch.addmm(columns, xq, wq.t(), beta=0, alpha=alpha, out=columns)
            else:
                columns.copy_(xq.float() @ part.unscaled(torch.float32).t() * alpha)
        return out if bias is None else out.add_(bias)

    def refresh(self, weight: torch.Tensor) -> None:
        # A new tensor scale each time: the one that is there may be lost memory, or far too large for the new weights.
        sizes = [part.shape[0] for part in self._parts]
        self.replace([quantize_nvfp4(rows, scales=self._scales) for rows in torch.split(weight, sizes)])

    @property
    def by_value(self) -> tuple[float, ...]:
        return tuple(self._alphas)

    def replace(self, ready: Sequence[Piece]) -> None:
        fresh = pieces(ready, NVFP4Tensor, self.precision)
        copy_all(self.tensors(), tuple(t for p in fresh for t in (p.packed, p.block_scales, p.tensor_scale)))
        self._set_alphas()

    def _set_alphas(self) -> None:
        self._alphas = [float(part.tensor_scale) for part in self._parts]
