"""Packed NVFP4 weights to BF16, before the BF16 GEMM of the emulated linear.

Bit for bit the numbers of ``formats/nvfp4.py`` (its docstring has the maths). Decoding places the bits of a small
format in an FP32 of minimal exponent and multiplies by a power of two, which makes the small format's subnormals right
as well. Bound by memory: 2.5625 bytes for each weight.

Refused (ValueError): other dtypes, tensors that are not contiguous CUDA tensors, K not a multiple of 16.
"""

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.checks import require
from mixquant_sglang.kernels.triton.grid import e4m3_value

_WEIGHT_BLOCKS = 256  # of 16 weights, for each program


def unscaled(packed: torch.Tensor, block_scales: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``NVFP4Tensor.unscaled()``: uint8 [N, K/2] and float8_e4m3fn [N, K/16] (finite, >= 0) -> bfloat16 [N, K].

    Writes into ``out`` (bfloat16 [N, K]) if given. No synchronisation, fit for CUDA graphs. ValueError: see above.
    """
    require(packed, "packed", ("N", "K/2"), torch.uint8)
    require(block_scales, "block_scales", ("N", "K/16"), torch.float8_e4m3fn)
    n, k = packed.shape[0], packed.shape[1] * 2
    if k % 16 or block_scales.shape != (n, k // 16):
        raise ValueError(
            f"packed {list(packed.shape)} needs block_scales [{n}, {k}/16], got {list(block_scales.shape)}"
        )
    if out is None:
        out = torch.empty((n, k), dtype=torch.bfloat16, device=packed.device)
    require(out, "out", (n, k))
    blocks = n * k // 16
    if blocks:
        _unpack_weights[(triton.cdiv(blocks, _WEIGHT_BLOCKS),)](
            packed, block_scales.view(torch.uint8), out.view(torch.int32), blocks, BLOCKS=_WEIGHT_BLOCKS, num_warps=4
        )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_weights(
    packed_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor, blocks: tl.tensor, BLOCKS: tl.constexpr
) -> None:
    """Each byte becomes one 32-bit word of two BF16: the low nibble in the low half, which is the even element."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < blocks
    scale = e4m3_value(tl.load(scale_ptr + block, mask=mask, other=0).to(tl.int32) & 0x7F)[:, None]
    offset = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    byte = tl.load(packed_ptr + offset, mask=mask[:, None], other=0).to(tl.int32)
    low = ((byte & 0x07) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale  # 2^126
    high = ((byte & 0x70) << 18).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale
    low_half = ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | ((byte & 0x08) << 12)
    high_half = high.to(tl.int32, bitcast=True) | ((byte & 0x80) << 24)
    tl.store(out_ptr + offset, low_half | high_half, mask=mask[:, None])
