"""SGLang's linear of FP8 weights in blocks of 128 x 128."""

from __future__ import annotations

import torch

from mixquant_sglang.formats import TILE
from mixquant_sglang.recipe.select import Device


def block_linear(device: Device) -> BlockLinear:
    return BlockLinear(cutlass=device.capability is not None and device.capability[0] in (9, 10))


class BlockLinear:
    """sgl-kernel's CUTLASS GEMM where SGLang has it (SM90, SM100; it falls back to Triton for weights that are no
    multiple of 128), its Triton one elsewhere.  Not what ``--fp8-gemm-backend`` names: DeepGEMM, which SGLang prefers,
    rounds scales to powers of two from SM100 on, and decode reads the same ones."""

    def __init__(self, *, cutlass: bool) -> None:
        from sglang.srt.layers.quantization import fp8_utils

        self._linear = (
            fp8_utils.cutlass_w8a8_block_fp8_linear_with_fallback if cutlass else fp8_utils.triton_w8a8_block_fp8_linear
        )

    def __call__(self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._linear(x, codes, [TILE, TILE], scales)
        return out
