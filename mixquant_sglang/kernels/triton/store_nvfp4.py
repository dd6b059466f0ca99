"""A row to NVFP4: ``formats.nvfp4.quantize_activations``."""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.codes import eight_codes, half_encode
from mixquant_sglang.kernels.triton.grid import block_scale_of, e4m3_code, encode_scale
from mixquant_sglang.kernels.triton.pieces import both, eighth, whole
from mixquant_sglang.kernels.triton.row_scale import row_scale_of
from mixquant_sglang.kernels.triton.words import bf16_pairs, floats, four_columns, larger_pair


@triton.jit  # type: ignore[untyped-decorator]
def store_nvfp4(
    row_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    y: tl.tuple,
    live: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tuple:
    """The codes and the row scale of a row, if it is ``live``; returns the block scales' bytes, int32 [blocks] each.

    Eight codes make a 32-bit word, the first code lowest; a block's maximum serves its row too.

    Instructions are scarce: an H200 issues 17 for each element in the time that ``quantize`` needs for its bytes, and
    half as many of those that are not multiplications or additions.
    """
    magnitudes: tl.tuple = ()
    for i in tl.static_range(0, len(y), 2 if SPLIT else 1):
        magnitudes += (_block_maximum(y[i], y[i + 1] if SPLIT else y[i], THREADS, SPLIT, SM),)
    largest = tl.max(_largest_of(magnitudes))
    row_scale, inverse = row_scale_of(largest)
    tl.store(row_scale_ptr, row_scale, mask=live)
    finite = largest < 0x7F800000
    factor = inverse
    scaled = y
    if SM < 100 and largest >= 0x70000000:  # 2^97: inverse * encode would be too small for a normal float
        scaled = _times(y, 5.421010862427522e-20, THREADS, SM)  # 2^-64
        factor = inverse * 1.8446744073709552e19
    scales: tl.tuple = ()
    for block in tl.static_range(len(magnitudes)):
        scale = block_scale_of(magnitudes[block].to(tl.float32, bitcast=True) * inverse)
        encode = encode_scale(scale) if SM >= 100 else tl.minimum(half_encode(scale) * factor, 3.4028234663852886e38)
        if SPLIT:
            first = eight_codes(scaled[block * 2], encode, inverse, THREADS, SM)
            second = eight_codes(scaled[block * 2 + 1], encode, inverse, THREADS, SM)
            codes = tl.where(finite, tl.join(first, second), 0).to(tl.int32, bitcast=True)
            column = tl.arange(0, THREADS)[:, None] * 2 + tl.arange(0, 2)[None, :]
            wanted = tl.broadcast_to(eighth(block * 2, THREADS, True)[:, None] < K // 8, [THREADS, 2])
        else:
            encode = tl.reshape(tl.broadcast_to(encode[:, None], [THREADS // 2, 2]), [THREADS])
            codes = tl.where(finite, eight_codes(scaled[block], encode, inverse, THREADS, SM), 0).to(
                tl.int32, bitcast=True
            )
            column = tl.arange(0, THREADS)
            wanted = eighth(block, THREADS, False) < K // 8
        code_ptr = row_ptr + column + block * THREADS * (2 if SPLIT else 1)
        if whole(block * 2 if SPLIT else block, K, THREADS, SPLIT):
            tl.store(code_ptr, codes, mask=live)
        else:
            tl.store(code_ptr, codes, mask=both(wanted, live))
        scales += (tl.where(finite, e4m3_code(scale), 0),)
    return scales


@triton.jit  # type: ignore[untyped-decorator]
def _times(row: tl.tuple, factor: tl.constexpr, THREADS: tl.constexpr, SM: tl.constexpr) -> tl.tuple:
    product: tl.tuple = ()
    for i in tl.static_range(len(row)):
        product += (bf16_pairs(floats(row[i], THREADS) * factor, THREADS, SM),)
    return product


@triton.jit  # type: ignore[untyped-decorator]
def _block_maximum(
    first: tl.tensor, second: tl.tensor, THREADS: tl.constexpr, SPLIT: tl.constexpr, SM: tl.constexpr
) -> tl.tensor:
    """int32 [blocks]: the bits of the FP32 magnitude, at least those of infinity if one is not finite."""
    a, b, c, d = four_columns(first, THREADS)
    largest = larger_pair(larger_pair(a, b, SM), larger_pair(c, d, SM), SM)
    if SPLIT:
        a, b, c, d = four_columns(second, THREADS)
        other = larger_pair(larger_pair(a, b, SM), larger_pair(c, d, SM), SM)
        largest = larger_pair(largest, other, SM)
    low, high = (largest << 16) & 0x7FFF0000, largest & 0x7FFF0000
    largest = tl.maximum(low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True))
    return largest if SPLIT else tl.max(tl.reshape(largest, [THREADS // 2, 2]), axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _largest_of(magnitudes: tl.tuple) -> tl.tensor:
    largest = magnitudes[0]
    for i in tl.static_range(1, len(magnitudes)):
        largest = tl.maximum(largest, magnitudes[i])
    return largest
