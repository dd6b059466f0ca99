"""SGLang's linear of FP8 weights in blocks of 128 x 128."""

from __future__ import annotations

import torch

from mixquant_sglang.formats import TILE
from mixquant_sglang.recipe.select import Device


def block_linear(device: Device) -> BlockLinear:
    return BlockLinear(cutlass=device.capability is not None and device.capability[0] >= 12)


class BlockLinear:
    """SGLang's CUTLASS GEMM on SM120 (for other GPUs it has none and raises; weights that are no multiple of 128 it
    leaves to Triton), its Triton one elsewhere.  Not what ``--fp8-gemm-backend`` names: DeepGEMM, which SGLang prefers,
    rounds scales to powers of two from SM100 on, and decode reads the same ones; on SM90 nobody has tried it here."""

    def __init__(self, *, cutlass: bool) -> None:
        from sglang.srt.layers.quantization import fp8_utils

        self._linear = (
            fp8_utils.cutlass_w8a8_block_fp8_linear_with_fallback if cutlass else fp8_utils.triton_w8a8_block_fp8_linear
        )

    def __call__(self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._linear(x, codes, [TILE, TILE], scales)
        return out
