"""The global scales that compressed-tensors stores, of weights and of inputs: g = 448 * 6 / max|x| in FP32."""

from __future__ import annotations

import torch

from mixquant_sglang.formats.blocks import E2M1_MAX, E4M3_MAX
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor

WINDOW = 1.0  # input scale without calibration


def encode_scale(amax: float) -> torch.Tensor:
    """``weight_global_scale`` float32 [1] for a weight, or a fused group, of largest magnitude ``amax``; see
    ``command.py``."""
    g = _full_range(amax) if amax else torch.ones(1)
    while not _reads_alike(g):
        g = torch.nextafter(g, torch.zeros(1))
    return g


def input_scale(amax: float | None) -> torch.Tensor:
    """``input_global_scale`` float32 [1] for inputs of largest magnitude ``amax``; None or 0: not calibrated."""
    return _full_range(amax) if amax else torch.full((1,), WINDOW)


def _full_range(amax: float) -> torch.Tensor:
    return (E4M3_MAX * E2M1_MAX / torch.tensor([amax], dtype=torch.float32)).clamp_(max=2.0**126)


def _reads_alike(g: torch.Tensor) -> bool:
    """Whether every product of an element and a block scale decompresses to the same BF16 number in either order."""
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    ours = NVFP4Tensor(packed.expand(127, 8), scales, g.reciprocal()[0]).dequantize()
    one = torch.ones((1, 1)).to(torch.float8_e4m3fn)
    elements = NVFP4Tensor(packed, one, torch.ones(())).unscaled(torch.float32)
    return torch.equal(ours, (elements * (scales.float() / g)).bfloat16())
