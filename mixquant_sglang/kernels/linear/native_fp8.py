"""FP8 on tensor cores (SM89 and newer), through the fastest GEMM of well-kept libraries (``tuning/fp8_gemm.py``), or,
where a row's bits must not depend on their number of rows, through one of ours (``triton/invariant.py``).

    y[m, n] = sx[m] * sw[n] * sum_k xq[m, k] wq[n, k],   xq, wq in E4M3

Scales are dynamic per token and fixed per output channel, as in SGLang's ``w8a8_fp8``: no row depends on another.
What the libraries have beside: ``docs/kernels.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixquant_sglang.formats import fp8
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.linear.base import PackedLinear, Piece, copy_all
from mixquant_sglang.kernels.linear.emulated_fp8 import joined
from mixquant_sglang.kernels.tuning import fp8_gemm


class NativeFP8(PackedLinear):
    precision = "fp8"
    kernel = "native"
    activation_format = "fp8"

    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scales: str = "search",
        ready: Sequence[Piece] | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        packed = fp8.quantize(weight) if ready is None else joined(ready)
        self._weight = packed.data  # [N, K] row major, so its transpose is the column-major operand that CUTLASS wants
        self._scales = packed.scales
        self._invariant = environment.invariant

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._weight, self._scales

    def multiply(self, operand: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        codes, scales = operand
        if codes.shape[0] == 0:
            return codes.new_empty(0, self._weight.shape[0], dtype=torch.bfloat16)
        if self._invariant:
            from mixquant_sglang.kernels.triton import invariant

            return invariant.scaled_mm(codes, self._weight, scales, self._scales, bias)
        return fp8_gemm.scaled_mm(codes, self._weight, scales, self._scales, bias)

    def columns(self, start: int, stop: int) -> NativeFP8:
        part = object.__new__(NativeFP8)
        part._weight, part._scales = self._weight[start:stop], self._scales[start:stop]
        part._invariant = self._invariant
        return part

    def refresh(self, weight: torch.Tensor) -> None:
        fresh = fp8.quantize(weight)
        copy_all(self.tensors(), (fresh.data, fresh.scales))

    def replace(self, ready: Sequence[Piece]) -> None:
        fresh = joined(ready)
        copy_all(self.tensors(), (fresh.data, fresh.scales))
