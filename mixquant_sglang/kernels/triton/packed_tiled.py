"""The kernel of ``packed_rows.py`` for more than few rows: tiles of weights in flight through shared memory.

Short and wide weights have too few tiles to fill a GPU, so programs may share a tile along K (``Tiles.split``): each
writes its sum, and the last to arrive adds all of them, in order. ``locks`` count arrivals and are left at zero; no two
launches that run at the same time may share them.
"""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.grid import e4m3_value
from mixquant_sglang.kernels.triton.widen import e2m1_to_bf16, e4m3_to_bf16


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _packed_rows(
    out_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    index_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lock_ptr: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    cut: tl.tensor,
    out_stride: tl.tensor,
    rest_stride: tl.tensor,
    rows_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """``rows``: how many there are, of which a tile takes ROWS. WHOLE: BLOCK_N divides N. Of NVFP4, ``rows_ptr`` and
    ``rows_stride`` are of pairs."""
    over_m = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    first_n = tile // over_m * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    slot = tile % over_m * ROWS + tl.arange(0, ROWS)
    row = slot
    if index_ptr is not None:
        row = tl.load(index_ptr + slot, mask=slot < rows, other=-1, eviction_policy="evict_last")
        if tl.load(index_ptr + tile % over_m * ROWS) < 0:
            return
    used = (slot < rows) & (row >= 0)
    steps = tl.cdiv(K // BLOCK_K, SPLIT)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, K)
    if block_scale_ptr is None:
        total = _sum_fp8(
            rows_ptr, codes_ptr, n, slot, used, N, K, rows_stride, begin, end, ROWS, BLOCK_N, BLOCK_K, WHOLE, SM
        )
    else:
        total = _sum_nvfp4(
            rows_ptr, codes_ptr, block_scale_ptr, n, slot, used, N, K, rows_stride, begin, end,
            ROWS, BLOCK_N, BLOCK_K, WHOLE, SM,
        )  # fmt: skip
    mask = used[None, :] & (n[:, None] < N)
    last = True
    if SPLIT > 1:
        place = slot[None, :].to(tl.int64) * N + n[:, None]
        size = rows.to(tl.int64) * N
        tl.store(partial_ptr + tl.program_id(1) * size + place, total, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()  # all of the program's numbers are written before it says so
        last = tl.atomic_add(lock_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            total = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
            for part in range(SPLIT):
                total += tl.load(partial_ptr + part * size + place, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(lock_ptr + tile, 0)
    if last:
        if block_scale_ptr is None:
            total *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
        else:
            total *= tl.load(scale_ptr) * 128.0  # 2^7: see ``widen.py``
        if bias_ptr is not None:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if first_n >= cut:  # a tile of ``rest``
            out_ptr = rest_ptr - cut
            out_stride = rest_stride
        tl.store(out_ptr + row[None, :].to(tl.int64) * out_stride + n[:, None], total.to(tl.bfloat16), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_fp8(
    rows_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    n: tl.tensor,
    slot: tl.tensor,
    used: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    rows_stride: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tensor:
    column = tl.arange(0, BLOCK_K)
    codes = codes_ptr + n[:, None].to(tl.int64) * K + column[None, :]
    x = rows_ptr + slot[None, :].to(tl.int64) * rows_stride + column[:, None]
    total = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        code = tl.load(codes + start) if WHOLE else tl.load(codes + start, mask=n[:, None] < N, other=0)
        x_tile = tl.load(x + start, mask=used[None, :], other=0.0)
        total = tl.dot(e4m3_to_bf16(code, SM), x_tile, total)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _sum_nvfp4(
    rows_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
    n: tl.tensor,
    slot: tl.tensor,
    used: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    rows_stride: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tensor:
    """A byte holds two neighbours, as an int32 does of x: all even ones are multiplied, then all odd ones."""
    pair = tl.arange(0, BLOCK_K // 2)
    codes = codes_ptr + n[:, None].to(tl.int64) * (K // 2) + pair[None, :]
    scales = block_scale_ptr + n[:, None].to(tl.int64) * (K // 16) + tl.arange(0, BLOCK_K // 16)[None, :]
    x = rows_ptr + slot[None, :].to(tl.int64) * rows_stride + pair[:, None]
    total = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        if WHOLE:
            code = tl.load(codes + start // 2)
            scale = tl.load(scales + start // 16)
        else:
            code = tl.load(codes + start // 2, mask=n[:, None] < N, other=0)
            scale = tl.load(scales + start // 16, mask=n[:, None] < N, other=0)
        x_tile = tl.load(x + start // 2, mask=used[None, :], other=0)
        scale = (e4m3_value(scale.to(tl.int32) & 0x7F) * 6.646139978924579e35).to(tl.bfloat16)  # 2^119
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_K // 16, 8)).reshape(BLOCK_N, BLOCK_K // 2)
        even, odd = e2m1_to_bf16(code, scale, SM)
        total = tl.dot(even, x_tile.to(tl.int16).to(tl.bfloat16, bitcast=True), total)
        total = tl.dot(odd, (x_tile >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), total)
    return total
