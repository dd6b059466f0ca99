"""The arithmetic of one NVFP4 block in FP32: limits, the scale to encode with, rounding to E2M1 (see ``nvfp4.py``)."""

import struct

import torch

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FLT_MAX = torch.finfo(torch.float32).max


def encode_scale(amax: torch.Tensor, scales: torch.Tensor, g: float) -> torch.Tensor:
    o = (scales.float() * f32(1 / g)).reciprocal_().clamp_(max=FLT_MAX)
    return o.masked_fill_(amax == 0, 0.0)


def round_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Round FP32 magnitudes <= 6 to E2M1 in place, to nearest even: adding 1.5 * 2^23 grid steps leaves no bits below a
    step. The step is .5, 1 or 2 for magnitudes in [0, 2), [2, 4), [4, 6]: half of the power of two below it, and at
    least .5."""
    power = (magnitude.view(torch.int32) & 0x7F800000).clamp_(min=0x3F800000).view(torch.float32)
    shift = power.mul_(0.75 * 2**23)
    return magnitude.add_(shift).sub_(shift)


def f32(value: float) -> float:
    """``value`` rounded to FP32. For one product or quotient of two FP32 numbers, float64 in between changes
    nothing."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
