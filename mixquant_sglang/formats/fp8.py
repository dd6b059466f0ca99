"""FP8 E4M3 with one FP32 scale for each row, in plain torch: rows are tokens of an activation or output channels of a
weight.

``scale = max(max|row| / 448, 2^-126)``, ``data = e4m3(clamp(x * (1/scale), -448, 448))``, FP32 with round-to-nearest at
every step, the cast to nearest even. The lower bound keeps 1/scale finite, for a row of zeros above all. Otherwise
this is the arithmetic of SGLang's ``sgl_per_token_quant_fp8`` as its source has it
(sgl-kernel/csrc/gemm/per_token_quant_fp8.cu; in 0.5.23 also kernels/jit/csrc/gemm/per_token_quant_fp8.cuh), which
multiplies by a rounded reciprocal too. What differs there, read but not measured:

- sgl-kernel builds its SM90 library with ``-use_fast_math`` and only its SM100 one without: on Hopper, ``/`` is
  approximate, so a scale can differ in its last bits, and an element that sits on a rounding boundary by one code;
- a row of zeros gets scale 0, and in the kernel for small batches codes of 448 (times 0: harmless);
- NaN is ignored by its ``fmaxf``; here a row with NaN or infinity dequantises to NaN throughout.

Refused (ValueError): anything but a floating-point matrix, and NaN or infinity in a weight. Activations are never
inspected by the host. Rows are independent bit for bit.
"""

from dataclasses import dataclass

import torch

E4M3_MAX = 448.0

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 2**24  # elements in flight, so that the FP32 temporaries of a big weight stay small


@dataclass(frozen=True, eq=False)
class FP8Tensor:
    """``x ~ data * scales[:, None]``: ``data`` float8_e4m3fn [N, K]; ``scales`` float32 [N], at least 2^-126."""

    data: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes held: N*K + 4*N."""
        return self.data.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The values [N, K]: one FP32 product for each element, then one cast to ``dtype``."""
        out = torch.empty(self.data.shape, dtype=dtype, device=self.data.device)
        step = max(1, _CHUNK // self.data.shape[1])
        for start in range(0, self.data.shape[0], step):
            rows = slice(start, start + step)
            out[rows] = self.data[rows].float().mul_(self.scales[rows, None])
        return out


def quantize(x: torch.Tensor) -> FP8Tensor:
    """Quantise a weight ``x`` [N, K] (float32, bfloat16, float16; any strides), one scale for each of the N rows.

    Synchronises with the device. ValueError: see this file's top.
    """
    quantized = quantize_activations(x)
    if not bool(quantized.scales.isfinite().all()):  # a row's maximum is NaN or infinite if one of its elements is
        raise ValueError("cannot quantise a weight that contains NaN or infinity: check the checkpoint")
    return quantized


def quantize_activations(x: torch.Tensor) -> FP8Tensor:
    """The same numbers for token rows ``x`` [M, K], M = 0 included; never synchronises with the device.

    A row with NaN or infinity in it gets a scale of NaN or infinity and dequantises to NaN.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"FP8 needs a matrix with at least one column, got shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"FP8 quantises {', '.join(map(str, _DTYPES))} here, got {x.dtype}")
    x = x.detach()
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    step = max(1, _CHUNK // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        data[rows], scales[rows] = _quantize_rows(x[rows])
    return FP8Tensor(data, scales)


def _quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    amax = x.abs().amax(dim=-1).float()
    scales = amax / torch.full_like(amax, E4M3_MAX)  # by a Python number, CUDA would multiply with a rounded 1/448
    scales = scales.clamp_(min=torch.finfo(torch.float32).tiny)
    return x.float().mul(scales.reciprocal()[:, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales
