"""What ``expert_rows.py`` multiplies by."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Matrix(NamedTuple):
    """A weight [E, N, K] and its bias, float32 [E, N] or None.  BF16: ``codes`` [E, N, K].  FP8: their bytes, uint8,
    and ``scales`` float32 [E, N].  NVFP4: ``codes`` uint8 [E, N, K/2], ``scales`` float32 [E, N] and the bytes of
    ``block_scales`` [E, N, K/16], which are finite and >= 0.  Of packed ones gate comes before up."""

    codes: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None = None
    block_scales: torch.Tensor | None = None

    @property
    def format(self) -> str:
        return "bf16" if self.scales is None else "fp8" if self.block_scales is None else "nvfp4"
