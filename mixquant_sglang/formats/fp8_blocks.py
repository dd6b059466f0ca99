"""FP8 E4M3 with one FP32 scale for each block of 128 x 128 weights, as checkpoints of DeepSeek and Qwen have it, and
for each 128 numbers along K of a token.

A weight is ``data[n, k] * scales[n // 128, k // 128]``; the last blocks of N and of K may be cut short.  Activations go
with it as SGLang's block GEMMs quantise them (``per_token_group_quant_fp8``): ``scale = max(max|group|, 1e-10) / 448``,
``data = e4m3(clamp(x * (1/scale), -448, 448))``, FP32 with round-to-nearest at every step.  Its kernels may divide
where this multiplies by the reciprocal, so an element on a rounding boundary can differ by one code.  A group with NaN
or infinity dequantises to NaN.  Rows are independent bit for bit.

Refused (ValueError): activations that are no floating-point matrix, or whose K is no multiple of 128.
"""

from dataclasses import dataclass

import torch

from mixquant_sglang.formats import TILE
from mixquant_sglang.formats.fp8 import E4M3_MAX

_LEAST = 1e-10
_CHUNK = 2**24


@dataclass(frozen=True, eq=False)
class FP8Blocks:
    """``data`` float8_e4m3fn [N, K]; ``scales`` float32 [ceil(N / 128), ceil(K / 128)], finite and >= 0."""

    data: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The values [N, K]: one FP32 product for each element, then one cast to ``dtype``."""
        n, k = self.data.shape
        out = torch.empty((n, k), dtype=dtype, device=self.data.device)
        step = TILE * max(1, _CHUNK // (TILE * k))
        for start in range(0, n, step):
            rows = slice(start, start + step)
            scales = self.scales[start // TILE : (start + step) // TILE].repeat_interleave(TILE, dim=1)[:, :k]
            values = self.data[rows].float()
            out[rows] = values.mul_(scales.repeat_interleave(TILE, dim=0)[: len(values)])
        return out


@dataclass(frozen=True, eq=False)
class FP8Groups:
    """Token rows: ``data`` float8_e4m3fn [M, K], ``scales`` float32 [M, K / 128]."""

    data: torch.Tensor
    scales: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values [M, K]."""
        m, k = self.data.shape
        values = self.data.float().view(m, -1, TILE) * self.scales[:, :, None]
        return values.view(m, k).to(dtype)


def blocks_of(size: int) -> int:
    """How many blocks ``size`` rows or columns have."""
    return -(-size // TILE)


def quantize_activations(x: torch.Tensor) -> FP8Groups:
    """Token rows ``x`` [M, K], M = 0 included; never synchronises with the device."""
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % TILE or not x.is_floating_point():
        raise ValueError(f"blocks of {TILE} need a floating-point matrix of such columns, got {x.dtype} {[*x.shape]}")
    groups = x.detach().float().view(len(x), x.shape[1] // TILE, TILE)
    amax = groups.abs().amax(dim=-1).clamp(min=_LEAST)
    scales = amax / torch.full_like(amax, E4M3_MAX)  # by a Python number, CUDA would multiply with a rounded 1/448
    data = (groups * scales.reciprocal()[:, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return FP8Groups(data.view(x.shape), scales)
