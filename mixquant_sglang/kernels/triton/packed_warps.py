"""The kernel of ``packed_rows.py`` for few rows: each warp reads its own weights straight into registers.

A program has ``Warps.n`` weight rows, and its warps share K: each reads pieces of 64 bytes of every row, 16 bytes a
thread, widens them by the bits and multiplies by all rows in tensor cores (m16n8k16); the warps' FP32 sums are added at
the end.  No packed byte goes through shared memory, and nothing goes through a scratch between programs.
NVFP4 whose K is no multiple of 32, which no tile divides, comes here with any number of rows, 16 at a time.

That takes an order of K in which the 16 bytes that a thread has read are the operands that tensor cores want of it. A
sum does not care, as long as ``rows`` are read in the same order.  Of a piece, thread ``t`` of four has bytes
16 t + 8 s + 4 p + 2 c + b, which are element 32 s + 16 p + 4 t + 2 c + b of the product.  Tensors here have a dimension
for these letters, for the pieces, the warps (``w``) and the weight rows 8 h + g, those of threads first: Triton gives
them to threads in that order, and all reshaping is a matter of names.  ``test_triton_compiles.py`` checks that nothing
goes through shared memory on the way.

The sum of a row has one order for any number of rows, which depends on K, PIECES and WARPS, not on BLOCK_N and ROWS.

Of the slots of a captured graph few are used, and how many is known when it runs. With WALK there are no programs for
the others: up to 8 used ones, which come first, are taken at once, and of more a program takes ROWS at a time, until it
finds one that is not used. It reads its weights from memory once, and again from the L2 cache: BLOCK_N rows of them are
64 KB for K = 4096. That is slow for many used ones.
"""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.grid import e4m3_value
from mixquant_sglang.kernels.triton.widen import e2m1_pairs, e4m3_pairs


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _packed_warps(
    out_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    index_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    units: tl.tensor,
    cut: tl.tensor,
    out_stride: tl.tensor,
    rest_stride: tl.tensor,
    rows_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    WARPS: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WALK: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """ROWS rows (a multiple of 8) for each program of the second axis; with WALK, which wants ``index_ptr`` of more
    than 8 slots, all used slots for each. ``codes_ptr``: words of four bytes, of which a weight row has
    ``units * UNIT``; of NVFP4, ``rows_ptr`` is of pairs. WHOLE_N: BLOCK_N divides N; WHOLE_K: what all warps read at
    once divides a weight row."""
    first_row, first_n = tl.program_id(1) * ROWS, tl.program_id(0) * BLOCK_N
    if index_ptr is not None:
        first = tl.load(index_ptr + first_row, eviction_policy="evict_last")
        if first < 0:
            return
    if not WALK:
        _some_rows(
            out_ptr, rest_ptr, index_ptr, rows_ptr, codes_ptr, scale_ptr, block_scale_ptr, bias_ptr, first_row,
            first_n, rows, N, units, cut, out_stride, rest_stride, rows_stride,
            ROWS, BLOCK_N, PIECES, WARPS, UNIT, WHOLE_N, WHOLE_K, "evict_first", SM,
        )  # fmt: skip
    elif ROWS > 8 and tl.load(index_ptr + 8, eviction_policy="evict_last") < 0:
        _some_rows(
            out_ptr, rest_ptr, index_ptr, rows_ptr, codes_ptr, scale_ptr, block_scale_ptr, bias_ptr, first_row,
            first_n, rows, N, units, cut, out_stride, rest_stride, rows_stride,
            8, BLOCK_N, PIECES, WARPS, UNIT, WHOLE_N, WHOLE_K, "evict_first", SM,
        )  # fmt: skip
    else:
        while first >= 0:
            _some_rows(
                out_ptr, rest_ptr, index_ptr, rows_ptr, codes_ptr, scale_ptr, block_scale_ptr, bias_ptr, first_row,
                first_n, rows, N, units, cut, out_stride, rest_stride, rows_stride,
                ROWS, BLOCK_N, PIECES, WARPS, UNIT, WHOLE_N, WHOLE_K, "", SM,
            )  # fmt: skip
            first_row += ROWS
            first = tl.load(index_ptr + first_row, mask=first_row < rows, other=-1, eviction_policy="evict_last")


@triton.jit  # type: ignore[untyped-decorator]
def _some_rows(
    out_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    index_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    first_row: tl.tensor,
    first_n: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    units: tl.tensor,
    cut: tl.tensor,
    out_stride: tl.tensor,
    rest_stride: tl.tensor,
    rows_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
    WARPS: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    EVICT: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """ROWS rows from ``first_row`` on by BLOCK_N weight rows from ``first_n`` on."""
    slot = first_row + tl.arange(0, ROWS)
    row = slot
    used = rows
    if index_ptr is not None:  # a number, asked once: the loop below waits for no index
        row = tl.load(index_ptr + slot, mask=slot < rows, other=-1, eviction_policy="evict_last")
        used = first_row + tl.sum((row >= 0).to(tl.int32), axis=0)
    H: tl.constexpr = BLOCK_N // 8
    STEP: tl.constexpr = 16 * PIECES * WARPS
    width = units * UNIT
    # [t, g, w, h, piece, words of 4, or two scales]
    thread = tl.arange(0, 4)[:, None, None, None, None, None]
    group = tl.arange(0, 8)[None, :, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None]
    h = tl.arange(0, H)[None, None, None, :, None, None]
    piece = tl.arange(0, PIECES)[None, None, None, None, :, None]
    n = first_n + h * 8 + group
    place = (warp * PIECES + piece) * 16 + thread * 4
    at = place + tl.arange(0, 4)
    codes = codes_ptr + n.to(tl.int64) * width + at
    code = _load(codes, n, at, 0, N, width, WHOLE_N, WHOLE_K, EVICT)
    if block_scale_ptr is not None:
        scale_at = place // 2 + tl.arange(0, 2)
        scales = block_scale_ptr + n.to(tl.int64) * (width // 2) + scale_at
        scale = _load(scales, n, scale_at, 0, N, width // 2, WHOLE_N, WHOLE_K, EVICT)
    total = tl.zeros((WARPS, BLOCK_N, ROWS), dtype=tl.float32)
    for start in range(0, width, STEP):
        # The next step's bytes are on their way while this one's are multiplied.
        next_code = _load(codes, n, at, start + STEP, N, width, WHOLE_N, WHOLE_K, EVICT)
        if block_scale_ptr is None:
            x = _columns_of_fp8(rows_ptr, first_row, used, start, width, rows_stride, ROWS, PIECES, WARPS, WHOLE_K)
            low, high = e4m3_pairs(code, SM)
            total = tl.dot(_matrix(low, high, BLOCK_N, PIECES, WARPS), x, total)
        else:
            next_scale = _load(scales, n, scale_at, (start + STEP) // 2, N, width // 2, WHOLE_N, WHOLE_K, EVICT)
            pairs = _columns_of_nvfp4(
                rows_ptr, first_row, used, start, width, rows_stride, ROWS, PIECES, WARPS, WHOLE_K
            )
            factor = e4m3_value(scale.to(tl.int32) & 0x7F) * 6.646139978924579e35  # 2^119
            factor = (factor.to(tl.int32, bitcast=True) >> 16) * 0x10001  # BF16 holds it
            factor = tl.broadcast_to(factor[:, :, :, :, :, :, None], (4, 8, WARPS, H, PIECES, 2, 2))
            factor = tl.reshape(factor, (4, 8, WARPS, H, PIECES, 4))
            even_low, even_high, odd_low, odd_high = e2m1_pairs(code, factor, SM)
            x_even, x_odd = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
            even = _matrix(even_low, even_high, BLOCK_N, PIECES, WARPS)
            odd = _matrix(odd_low, odd_high, BLOCK_N, PIECES, WARPS)
            total = tl.dot(even, x_even.to(tl.bfloat16, bitcast=True), total)
            total = tl.dot(odd, x_odd.to(tl.bfloat16, bitcast=True), total)
            scale = next_scale
        code = next_code
    result = tl.sum(total, axis=0)
    column = first_n + tl.arange(0, BLOCK_N)
    mask = (slot < used)[None, :] & (column[:, None] < N)
    if block_scale_ptr is None:
        result *= tl.load(scale_ptr + column, mask=column < N, other=0.0)[:, None]
    else:
        result *= tl.load(scale_ptr) * 128.0  # 2^7: see ``widen.py``
    if bias_ptr is not None:
        result += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    if first_n >= cut:  # a tile of ``rest``
        out_ptr = rest_ptr - cut
        out_stride = rest_stride
    tl.store(out_ptr + row[None, :].to(tl.int64) * out_stride + column[:, None], result.to(tl.bfloat16), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _load(
    pointers: tl.tensor,
    n: tl.tensor,
    at: tl.tensor,
    start: tl.tensor,
    N: tl.tensor,
    width: tl.tensor,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
    EVICT: tl.constexpr,
) -> tl.tensor:
    """``start`` places behind ``pointers``, which are at ``at``; zeros beyond ``width``. EVICT: what is read once
    need not stay in a cache."""
    inside = start < width if WHOLE_K else at + start < width
    if not WHOLE_N:
        inside = inside & (n < N)
    return tl.load(pointers + start, mask=inside, other=0, eviction_policy=EVICT)


@triton.jit  # type: ignore[untyped-decorator]
def _matrix(
    low: tl.tensor, high: tl.tensor, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, WARPS: tl.constexpr
) -> tl.tensor:
    """Words of BF16 pairs, c = 0 and c = 1 of [t, g, w, h, piece, 2 s + p] -> BF16 [w, 8 h + g, 64 piece + 32 s + 16 p
    + 4 t + 2 c + b]."""
    words = tl.join(low, high)
    first = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
    second = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    named = tl.reshape(tl.join(first, second), (4, 8, WARPS, BLOCK_N // 8, PIECES, 2, 2, 2, 2))
    return tl.reshape(tl.permute(named, (2, 3, 1, 4, 5, 6, 0, 7, 8)), (WARPS, BLOCK_N, 64 * PIECES))


@triton.jit  # type: ignore[untyped-decorator]
def _columns_of_fp8(
    rows_ptr: tl.tensor,
    first_row: tl.tensor,
    used: tl.tensor,
    start: tl.tensor,
    width: tl.tensor,
    rows_stride: tl.tensor,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_K: tl.constexpr,
) -> tl.tensor:
    """BF16 [w, 64 piece + 32 s + 16 p + 4 t + 2 c + b, row], read as [t, row % 8, w, row // 8, s, piece,
    4 p + 2 c + b]."""
    M: tl.constexpr = ROWS // 8
    thread = tl.arange(0, 4)[:, None, None, None, None, None, None]
    one = tl.arange(0, 8)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    eight = tl.arange(0, M)[None, None, None, :, None, None, None]
    half = tl.arange(0, 2)[None, None, None, None, :, None, None]
    piece = tl.arange(0, PIECES)[None, None, None, None, None, :, None]
    at = start * 4 + (warp * PIECES + piece) * 64 + thread * 16 + half * 8 + tl.arange(0, 8)
    slot = first_row + eight * 8 + one
    inside = slot < used
    if not WHOLE_K:
        inside = inside & (at < width * 4)
    x = tl.load(rows_ptr + slot.to(tl.int64) * rows_stride + at, mask=inside, other=0.0, eviction_policy="evict_last")
    named = tl.reshape(x, (4, 8, WARPS, M, 2, PIECES, 2, 4))
    return tl.reshape(tl.permute(named, (2, 5, 4, 6, 0, 7, 3, 1)), (WARPS, 64 * PIECES, ROWS))


@triton.jit  # type: ignore[untyped-decorator]
def _columns_of_nvfp4(
    rows_ptr: tl.tensor,
    first_row: tl.tensor,
    used: tl.tensor,
    start: tl.tensor,
    width: tl.tensor,
    rows_stride: tl.tensor,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_K: tl.constexpr,
) -> tl.tensor:
    """int32 of BF16 pairs, a pair for a byte: [w, 64 piece + 32 s + 16 p + 4 t + 2 c + b, row], read as [t, row % 8, w,
    row // 8, 2 s + p, piece, 2 c + b]."""
    M: tl.constexpr = ROWS // 8
    thread = tl.arange(0, 4)[:, None, None, None, None, None, None]
    one = tl.arange(0, 8)[None, :, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    eight = tl.arange(0, M)[None, None, None, :, None, None, None]
    quarter = tl.arange(0, 4)[None, None, None, None, :, None, None]
    piece = tl.arange(0, PIECES)[None, None, None, None, None, :, None]
    at = start * 4 + (warp * PIECES + piece) * 64 + thread * 16 + quarter * 4 + tl.arange(0, 4)
    slot = first_row + eight * 8 + one
    inside = slot < used
    if not WHOLE_K:
        inside = inside & (at < width * 4)
    x = tl.load(
        rows_ptr + slot.to(tl.int64) * (rows_stride // 2) + at, mask=inside, other=0, eviction_policy="evict_last"
    )
    named = tl.reshape(x, (4, 8, WARPS, M, 2, 2, PIECES, 4))
    return tl.reshape(tl.permute(named, (2, 6, 4, 5, 0, 7, 3, 1)), (WARPS, 64 * PIECES, ROWS))
