"""Linears of BF16 rows and packed weights: W8A16 of FP8, W4A16 of NVFP4.

    out[index[r], n] = scale[n] * sum_k rows[r, k] weight[n, k] + bias[n]     for every r with index[r] >= 0

The weights are the bytes that prefill's GEMM reads: they become BF16 in registers, which is exact (E4M3, and E2M1 times
a block scale of E4M3), and tensor cores add in FP32. Scales are applied to the sum, which is rounded once: the numbers
of ``formats/`` up to the order of the sum, which depends on the weight's shape and the bucket of the number of rows. No
row depends on another. Up to 128 rows the weights are read once: 1 or 0.5625 bytes each.

There are two kernels, and ``packed_tiles.choose`` says which serves. The one of few rows (``packed_warps.py``) reads
weights straight into registers and shares K among the warps of a program. The other, here, has them in flight through
shared memory. Short and wide weights have too few of its tiles to fill a GPU, so programs may share a tile along K
(``Tiles.split``): each writes its sum, and the last to arrive adds all of them, in order. ``locks`` count arrivals and
are left at zero; no two launches that run at the same time may share them.

SGLang's Marlin for FP8 and FP4 weights wants them in a layout of its own, a second copy: ``docs/kernels.md``.

Refused (ValueError): shapes and dtypes that do not fit together, K not a multiple of 16, tensors that are not row
major, ``index`` with more than ``MANY_ROWS`` slots. CUDA only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.limits import BLOCK, MANY_ROWS
from mixquant_sglang.kernels.triton.compiled import Compiled
from mixquant_sglang.kernels.triton.grid import e4m3_value
from mixquant_sglang.kernels.triton.launch import sm
from mixquant_sglang.kernels.triton.packed_tiles import (
    BUCKETS,
    LEAST,
    LOCKS,
    PLACED,
    Tiles,
    Warps,
    choose,
    fitting,
    shared_memory,
)
from mixquant_sglang.kernels.triton.packed_warps import _packed_warps
from mixquant_sglang.kernels.triton.widen import e2m1_to_bf16, e4m3_to_bf16


class Packed(NamedTuple):
    """A weight [N, K]. FP8: ``codes`` float8_e4m3fn [N, K] and ``scale`` float32 [N]. NVFP4: ``codes`` uint8 [N, K/2],
    ``scale`` float32 of no dimension, ``block_scales`` float8_e4m3fn [N, K/16], finite and >= 0.

    ``locks``: int32 [LOCKS], zero."""

    codes: torch.Tensor
    scale: torch.Tensor
    locks: torch.Tensor
    block_scales: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, width = self.codes.shape
        return n, width if self.block_scales is None else 2 * width


def linear_rows(
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
    tiles: Tiles | Warps | None = None,
) -> torch.Tensor:
    """rows bfloat16 [R, K], bias bfloat16 [N] -> bfloat16 [R, N].

    With ``index`` int64 [R] in place into ``out`` bfloat16 [T, N] (and ``rest``), as in ``few_rows.linear_rows_``. No
    synchronisation, fit for CUDA graphs. ``tiles``: others than the measured ones.
    """
    n, k = weight.shape
    m = len(rows)
    if out is None:
        out = torch.empty((m, n), dtype=torch.bfloat16, device=rows.device)
    _check(rows, weight, bias, out, index, rest)
    if m == 0 or n == 0:
        return out
    # Of rows to be placed most may be unused slots: those of a smaller tile cost less.
    most = BUCKETS[-1] if index is None else PLACED
    bucket = next((bucket for bucket in BUCKETS if bucket >= min(m, most)), most)
    fp4 = weight.block_scales is not None
    chosen = fitting(tiles or choose(n, k, bucket, fp4), n, k, m, bucket, fp4, shared_memory(rows.device))
    if isinstance(chosen, Warps):
        _by_warps(out, rest, index, rows, weight, bias, bucket, chosen)
    else:
        _by_tiles(out, rest, index, rows, weight, bias, bucket, chosen)
    return out


def _by_tiles(
    out: torch.Tensor,
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    bucket: int,
    tiles: Tiles,
) -> None:
    (n, k), m = weight.shape, len(rows)
    bucket = max(bucket, LEAST)
    scales = weight.block_scales
    partial = None
    if tiles.split > 1:
        partial = torch.empty((tiles.split, m, n), dtype=torch.float32, device=rows.device)
    if rest is None:
        rest, cut = out, n
    else:
        cut = out.shape[1]
    sizes = (n, k, cut, out.stride(0), rest.stride(0), rows.stride(0) if scales is None else rows.stride(0) // 2)
    constants = (bucket, tiles.n, tiles.k, tiles.split, n % tiles.n == 0, sm(rows.device))
    _tiled.launch(
        _packed_rows,
        (rows.device.index, scales is None, index is None, bias is None, *sizes, *constants, *tiles),
        _pointers(out, rest, index, rows, weight, bias, partial),
        (-(-m // bucket) * -(-n // tiles.n), tiles.split, 1),
        (
            *(out, rest, index, rows if scales is None else rows.view(torch.int32), weight.codes.view(torch.uint8)),
            *(weight.scale, None if scales is None else scales.view(torch.uint8), bias, partial, weight.locks),
            *(m, *sizes),
        ),
        constants,
        {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False},
    )


def _by_warps(
    out: torch.Tensor,
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    bucket: int,
    tiles: Warps,
) -> None:
    (n, k), m = weight.shape, len(rows)
    scales = weight.block_scales
    if rest is None:
        rest, cut = out, n
    else:
        cut = out.shape[1]
    width = k if scales is None else k // 2  # bytes
    unit = 2 if width % 16 else 4  # words that a weight row has some times
    taken = 8 if bucket <= 8 else 16
    whole = width % (64 * tiles.pieces * tiles.warps) == 0
    sizes = (n, width // (4 * unit), cut, out.stride(0), rest.stride(0), rows.stride(0))
    constants = (taken, tiles.n, tiles.pieces, tiles.warps, unit, n % tiles.n == 0, whole, sm(rows.device))
    _warped.launch(
        _packed_warps,
        (rows.device.index, scales is None, index is None, bias is None, *sizes, *constants),
        _pointers(out, rest, index, rows, weight, bias, None),
        (-(-n // tiles.n), -(-m // taken), 1),
        (
            *(out, rest, index, rows if scales is None else rows.view(torch.int32), weight.codes.view(torch.int32)),
            *(weight.scale, None if scales is None else scales.view(torch.uint8), bias),
            *(m, *sizes),
        ),
        constants,
        {"num_warps": tiles.warps, "num_stages": 1, "enable_fp_fusion": False},
    )


_tiled, _warped = Compiled(), Compiled()


def _pointers(
    out: torch.Tensor,
    rest: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    partial: torch.Tensor | None,
) -> int:
    """ORed, as ``Compiled`` wants them."""
    found = out.data_ptr() | rest.data_ptr() | rows.data_ptr() | weight.codes.data_ptr()
    found |= weight.scale.data_ptr() | weight.locks.data_ptr()
    for tensor in (index, weight.block_scales, bias, partial):
        if tensor is not None:
            found |= tensor.data_ptr()
    return found


def _check(
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    index: torch.Tensor | None,
    rest: torch.Tensor | None,
) -> None:
    n, k = weight.shape
    m, fp4 = len(rows), weight.block_scales is not None
    if k % BLOCK or k == 0:
        raise ValueError(f"K must be a positive multiple of {BLOCK}, got {k}")
    cut = n if rest is None else out.shape[1]
    wanted = [
        ("rows", rows, torch.bfloat16, (m, k)),
        ("out", out, torch.bfloat16, (m if index is None else len(out), cut)),
        ("codes", weight.codes, torch.uint8 if fp4 else torch.float8_e4m3fn, (n, k // 2 if fp4 else k)),
        ("scale", weight.scale, torch.float32, () if fp4 else (n,)),
        ("locks", weight.locks, torch.int32, (LOCKS,)),
    ]
    if weight.block_scales is not None:
        wanted.append(("block_scales", weight.block_scales, torch.float8_e4m3fn, (n, k // BLOCK)))
    if rest is not None:
        wanted.append(("rest", rest, torch.bfloat16, (len(out), n - cut)))
        if cut % 64:
            raise ValueError(f"out must have a multiple of 64 columns beside rest, got {cut}")
    if bias is not None:
        wanted.append(("bias", bias, torch.bfloat16, (n,)))
    if index is not None:
        wanted.append(("index", index, torch.int64, (m,)))
        if m > MANY_ROWS:
            raise ValueError(f"index must have at most {MANY_ROWS} slots, got {m}")
    for name, tensor, dtype, shape in wanted:
        dense = tensor.is_contiguous() if name not in ("rows", "out", "rest") else tensor.stride(1) == 1
        if tensor.dtype != dtype or tensor.shape != shape or not dense:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)}, row major; "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    if fp4 and rows.stride(0) % 2:
        raise ValueError(f"rows must start at even places, got a stride of {rows.stride(0)}")


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
