"""NVFP4 weights and BF16 activations, on the bytes that the emulated NVFP4 kernel packs and unpacks.

    y[m, n] = alpha_n * sum_k x[m, k] wq[n, k] (+ bias[n]),   wq = E2M1 x E4M3, exact in BF16

One FP32 sum, one rounding to BF16: activations are not quantised, so nothing but the weights is rounded.  Weights whose
parts (q, k, v) have tensor scales of their own take a product for each.  Block scales are read row by row, as the
emulated kernel has them: not in the tiles of Blackwell's GEMMs.
SGLang's Marlin FP4 and FlashInfer's ``mm_bf16_fp4`` want layouts of their own: ``docs/kernels.md``.
"""

from __future__ import annotations

from typing import Any

import torch

from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.limits import WIDE
from mixquant_sglang.kernels.linear.base import PackedLinear
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.kernels.linear.weight_only import WeightOnly, chunked, locks, widened


class EmulatedW4A16(WeightOnly):
    """With torch alone, on a GPU with ``triton/unpack.py``."""

    precision = "w4a16"
    kernel = "emulated"
    _base: EmulatedNVFP4

    @classmethod
    def packed(cls, *args: Any, **kwargs: Any) -> PackedLinear:
        return EmulatedNVFP4(*args, **kwargs)

    def adopt(self, base: PackedLinear) -> None:
        if not isinstance(base, EmulatedNVFP4):
            raise TypeError(f"w4a16 reads the weights of the emulated NVFP4 kernel, not of {type(base).__name__}")
        super().adopt(base)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return chunked(x, bias, self._multiply)

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return joined(self._base.parts, bias, lambda part, b: widened(x, unscaled(part), part.tensor_scale, b))


class NativeW4A16(EmulatedW4A16):
    """On CUDA by ``triton/packed_rows.py``, up to ``WIDE`` rows."""

    kernel = "native"

    def adopt(self, base: PackedLinear) -> None:
        super().adopt(base)
        self._locks = locks(self.tensors()[0].device)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(x) > WIDE:
            return super().matmul(x, bias)
        from mixquant_sglang.kernels.triton.packed_rows import linear_rows

        return joined(self._base.parts, bias, lambda part, b: linear_rows(x, self._of(part), b))

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
        from mixquant_sglang.kernels.triton.packed_rows import linear_rows

        (part,) = self._base.parts
        linear_rows(rows, self._of(part), bias, out=out, index=index, rest=rest)

    def _of(self, part: NVFP4Tensor) -> Any:
        from mixquant_sglang.kernels.triton.packed_rows import Packed

        return Packed(part.packed, part.tensor_scale, self._locks, part.block_scales)


def joined(parts: Any, bias: torch.Tensor | None, multiply: Any) -> torch.Tensor:
    """The results of ``multiply(part, its bias)`` side by side."""
    sizes = [part.shape[0] for part in parts]
    biases = [None] * len(parts) if bias is None else torch.split(bias, sizes)
    made = [multiply(part, b) for part, b in zip(parts, biases, strict=True)]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def unscaled(part: NVFP4Tensor) -> torch.Tensor:
    """BF16 [N, K] without the tensor scale."""
    if part.packed.is_cuda:
        from mixquant_sglang.kernels.triton import unpack

        return unpack.unscaled(part.packed, part.block_scales)
    return part.unscaled(torch.bfloat16)
