"""Linears of BF16 activations that read the packed weights of another kernel: one copy for both.

On a GPU few rows go through ``triton/packed_rows.py``, which reads each weight once.  More than ``limits.WIDE`` rows
pay for unpacking all weights of the linear to BF16 just in time (a scratch of 2 bytes for each), and cuBLAS; results
are FP32 until scales and bias are applied, for ``_CHUNK`` rows at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.linear.base import PackedLinear, Piece

_CHUNK = 2048


class WeightOnly(PackedLinear):
    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scales: str = "search",
        ready: Sequence[Piece] | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        self.adopt(self.packed(weight, scales=scales, ready=ready, environment=environment))

    @classmethod
    @abstractmethod
    def packed(cls, *args: Any, **kwargs: Any) -> PackedLinear:
        """The kernel that packs, made with the arguments of ``__init__``; it need not run here."""

    @classmethod
    def of(cls, base: PackedLinear) -> WeightOnly:
        """On the memory of ``base``; ``refresh`` of either is that of both."""
        made: WeightOnly = object.__new__(cls)
        made.adopt(base)
        return made

    def adopt(self, base: PackedLinear) -> None:
        self._base = base

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._base.tensors()

    def refresh(self, weight: torch.Tensor) -> None:
        self._base.refresh(weight)

    def replace(self, ready: Sequence[Piece]) -> None:
        self._base.replace(ready)


def locks(device: torch.device) -> torch.Tensor:
    """Those that one linear needs."""
    from mixquant_sglang.kernels.triton.packed_tiles import LOCKS

    return torch.zeros(LOCKS, dtype=torch.int32, device=device)


def chunked(
    x: torch.Tensor, bias: torch.Tensor | None, multiply: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
) -> torch.Tensor:
    """``multiply`` of some rows at a time."""
    if len(x) <= _CHUNK:
        return multiply(x, bias)
    return torch.cat([multiply(rows, bias) for rows in torch.split(x, _CHUNK)])


def widened(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """BF16 x [M, K] and ``weight`` [N, K] of exact values -> BF16 [M, N]; ``scale`` float32, of each n or of all."""
    if x.is_cuda:  # tensor cores add in FP32
        total = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        total = x.to(torch.float32) @ weight.to(torch.float32).t()
    total *= scale
    if bias is not None:
        total += bias
    return total.to(x.dtype)
