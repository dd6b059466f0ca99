"""The two passes of the emulated NVFP4 linear: activations to NVFP4 and back, and packed weights to BF16.

Bit for bit the numbers of ``formats/nvfp4.py`` (its docstring has the maths). Everything rounds in FP32 by adding and
subtracting 1.5 * 2^23 grid steps, so the code must not be contracted to FMAs (``enable_fp_fusion=False``), and ``/`` is
not IEEE division in Triton (``tl.div_rn`` is). Decoding places the bits of a small format in an FP32 of minimal
exponent and multiplies by a power of two, which makes the small format's subnormals right as well.

Both are bound by memory: 4 bytes for each activation, 2.5625 for each weight.

Refused (ValueError): other dtypes, tensors that are not contiguous CUDA tensors, K not a multiple of 16.
"""

import torch
import triton
import triton.language as tl

_ROW_BLOCKS = 256  # of 16 activations, at a time
_WEIGHT_BLOCKS = 256  # of 16 weights, for each program


def qdq_activations(x: torch.Tensor) -> torch.Tensor:
    """``formats.nvfp4.quantize_activations(x).dequantize()`` in one pass: bfloat16 [M, K] -> bfloat16 [M, K].

    K a positive multiple of 16; M = 0 is fine. No synchronisation, fit for CUDA graphs. ValueError: see above.
    """
    _require(x, torch.bfloat16, "x")
    m, k = x.shape
    if k == 0 or k % 16:
        raise ValueError(f"K must be a positive multiple of 16, got {k}")
    out = torch.empty_like(x)
    if m:
        blocks = min(triton.next_power_of_2(k // 16), _ROW_BLOCKS)
        warps = 8 if k > blocks * 16 else max(blocks // 64, 1)
        _qdq_rows[(m,)](x, out, K=k, BLOCKS=blocks, num_warps=warps, enable_fp_fusion=False)
    return out


def unscaled(packed: torch.Tensor, block_scales: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``NVFP4Tensor.unscaled()``: uint8 [N, K/2] and float8_e4m3fn [N, K/16] (finite, >= 0) -> bfloat16 [N, K].

    Writes into ``out`` (bfloat16 [N, K]) if given. No synchronisation, fit for CUDA graphs. ValueError: see above.
    """
    _require(packed, torch.uint8, "packed")
    _require(block_scales, torch.float8_e4m3fn, "block_scales")
    n, k = packed.shape[0], packed.shape[1] * 2
    if k % 16 or block_scales.shape != (n, k // 16):
        raise ValueError(
            f"packed {list(packed.shape)} needs block_scales [{n}, {k}/16], got {list(block_scales.shape)}"
        )
    if out is None:
        out = torch.empty((n, k), dtype=torch.bfloat16, device=packed.device)
    _require(out, torch.bfloat16, "out")
    if out.shape != (n, k):
        raise ValueError(f"out must be [{n}, {k}], got {list(out.shape)}")
    blocks = n * k // 16
    if blocks:
        _unpack_weights[(triton.cdiv(blocks, _WEIGHT_BLOCKS),)](
            packed, block_scales.view(torch.uint8), out.view(torch.int32), blocks, BLOCKS=_WEIGHT_BLOCKS, num_warps=4
        )
    return out


def _require(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.ndim != 2 or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name} must be a contiguous {dtype} matrix, got {found}")


@triton.jit  # type: ignore[untyped-decorator]
def _qdq_rows(x_ptr: tl.tensor, out_ptr: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr) -> None:
    """One program for each row. The first chunk of BLOCKS blocks stays in registers; the others, which only wide rows
    have, are read a second time, from the L1 cache."""
    start = tl.program_id(0).to(tl.int64) * K
    bits, block_max = _load_blocks(x_ptr + start, 0, K, BLOCKS)
    row_max = tl.max(block_max, axis=0)
    for chunk in range(BLOCKS * 16, K, BLOCKS * 16):
        _, chunk_max = _load_blocks(x_ptr + start, chunk, K, BLOCKS)
        row_max = tl.maximum(row_max, tl.max(chunk_max, axis=0))

    exponent = (row_max >> 23) - 138 + ((row_max & 0x7FFFFF) > 0x280000).to(tl.int32)
    exponent = tl.where(row_max == 0, 0, tl.maximum(exponent, -126))
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(row_max < 0x7F800000, scale, float("nan"))

    _store_blocks(out_ptr + start, 0, K, bits, block_max, inverse, scale, BLOCKS)
    for chunk in range(BLOCKS * 16, K, BLOCKS * 16):
        bits, block_max = _load_blocks(x_ptr + start, chunk, K, BLOCKS)
        _store_blocks(out_ptr + start, chunk, K, bits, block_max, inverse, scale, BLOCKS)


@triton.jit  # type: ignore[untyped-decorator]
def _load_blocks(
    row_ptr: tl.tensor, chunk: tl.tensor, K: tl.constexpr, BLOCKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """FP32 bits [BLOCKS, 16], and each block's largest magnitude: compared as integers, NaN and infinity win."""
    column = chunk + tl.arange(0, BLOCKS)[:, None] * 16
    x = tl.load(row_ptr + column + tl.arange(0, 16)[None, :], mask=column < K, other=0.0)
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return bits, tl.max(bits & 0x7FFFFFFF, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _store_blocks(
    row_ptr: tl.tensor,
    chunk: tl.tensor,
    K: tl.constexpr,
    bits: tl.tensor,
    block_max: tl.tensor,
    inverse: tl.tensor,
    row_scale: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    amax = block_max.to(tl.float32, bitcast=True) * inverse
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True) * inverse
    scale = _round_to_steps(tl.minimum(amax * 0.16666667163372040, 448.0), 3, 118)  # E4M3: 2^(e-3), at least 2^-9
    # where the scale is 0, so is the value, whatever the code; 2^-9 is the least scale otherwise
    encode = tl.div_rn(1.0, tl.maximum(scale, 0.001953125))
    value = _round_to_steps(tl.minimum(magnitude * encode[:, None], 6.0), 1, 126)  # E2M1: 2^(e-1), at least 2^-1
    value = value * (scale * row_scale)[:, None]
    result = (value.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    column = chunk + tl.arange(0, BLOCKS)[:, None] * 16
    tl.store(row_ptr + column + tl.arange(0, 16)[None, :], result.to(tl.bfloat16), mask=column < K)


@triton.jit  # type: ignore[untyped-decorator]
def _round_to_steps(x: tl.tensor, MANTISSA_BITS: tl.constexpr, LEAST_STEP: tl.constexpr) -> tl.tensor:
    """x >= 0 to the nearest multiple, ties to even, of 2^(exponent(x) - MANTISSA_BITS) or 2^(LEAST_STEP - 127)."""
    step = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - MANTISSA_BITS, LEAST_STEP)
    shift = (step << 23).to(tl.float32, bitcast=True) * 12582912.0  # 1.5 * 2^23
    return (x + shift) - shift


@triton.jit  # type: ignore[untyped-decorator]
def _unpack_weights(
    packed_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor, blocks: tl.tensor, BLOCKS: tl.constexpr
) -> None:
    """Each byte becomes one 32-bit word of two BF16: the low nibble in the low half, which is the even element."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < blocks
    scale_bits = (tl.load(scale_ptr + block, mask=mask, other=0).to(tl.int32) & 0x7F) << 20
    scale = (scale_bits.to(tl.float32, bitcast=True) * 1.3292279957849159e36)[:, None]  # 2^120
    offset = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    byte = tl.load(packed_ptr + offset, mask=mask[:, None], other=0).to(tl.int32)
    low = ((byte & 0x07) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale  # 2^126
    high = ((byte & 0x70) << 18).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale
    low_half = ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | ((byte & 0x08) << 12)
    high_half = high.to(tl.int32, bitcast=True) | ((byte & 0x80) << 24)
    tl.store(out_ptr + offset, low_half | high_half, mask=mask[:, None])
