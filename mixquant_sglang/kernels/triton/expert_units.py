"""Pairs, each a row and one of its experts: which experts a few rows have chosen, and the sum over those of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.limits import FEW_ROWS

BUCKETS = (1, 16, FEW_ROWS)  # slots: what kernels are compiled for
MEMBERS = 8  # pairs of a unit at most: the rows of the other operand that tensor cores take at a time
RECORD = 4 * MEMBERS  # int32


def list_units(index: torch.Tensor, ids: torch.Tensor, experts: int, *, early: bool) -> torch.Tensor:
    """index int64 [R] (-1 for unused slots, at its end), ids int32 [T, k] (-1: another rank's) -> int32, records of
    ``RECORD``: how many units there are; then of each its expert, how many pairs of it, from MEMBERS on the numbers of
    these (k times the slot, and the place of the expert), from 2 MEMBERS on their rows.

    Units are ordered by expert; an expert with more pairs has several.  ``early``: kernels that wait for this one may
    start before it ends (SM90)."""
    (slots,), (_, k) = index.shape, ids.shape
    most = next(bucket for bucket in BUCKETS if slots <= bucket)
    units = torch.empty((1 + slots * k) * RECORD, dtype=torch.int32, device=index.device)
    _list_units[(slots * k,)](
        *(units, index, ids, slots),
        TOP_K=k,
        PAIRS=max(triton.next_power_of_2(most * k), 16),
        MEMBERS=MEMBERS,
        RECORD=RECORD,
        BINS=triton.next_power_of_2(experts + 1),
        EARLY=early,
        num_warps=4,
    )
    return units


def combine(
    out: torch.Tensor, index: torch.Tensor, ids: torch.Tensor, parts: torch.Tensor, scaling: float, *, early: bool
) -> None:
    """parts bfloat16 [R k, H], of pairs, summed in FP32 over the pairs of a row, times ``scaling``, into rows ``index``
    of out.  ``early``: it may start before the kernel that it follows ends (SM90)."""
    (_, h), (_, k) = parts.shape, ids.shape
    options = {"launch_pdl": True} if early else {}
    _combine[(len(index), triton.cdiv(h, 1024))](
        *(parts, out, index, ids, scaling), H=h, TOP_K=k, BN=1024, EARLY=early, num_warps=4, **options
    )


@triton.jit  # type: ignore[untyped-decorator]
def _experts_of_pairs(
    index_ptr: tl.tensor, ids_ptr: tl.tensor, slots: tl.tensor, TOP_K: tl.constexpr, PAIRS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """int64 rows and int32 experts of all pairs [PAIRS]; -1 where there is none."""
    pair = tl.arange(0, PAIRS)
    row = tl.load(index_ptr + pair // TOP_K, mask=pair < slots * TOP_K, other=-1)
    return row, tl.load(ids_ptr + row * TOP_K + pair % TOP_K, mask=row >= 0, other=-1)


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def _list_units(
    list_ptr: tl.tensor,
    index_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    slots: tl.tensor,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    MEMBERS: tl.constexpr,
    RECORD: tl.constexpr,
    BINS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """A program for a pair; those whose place among the pairs of their expert divides by MEMBERS write a record."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    mine = tl.program_id(0)
    my_row = tl.load(index_ptr + mine // TOP_K)
    if (my_row < 0) & (mine > 0):
        return
    row, experts = _experts_of_pairs(index_ptr, ids_ptr, slots, TOP_K, PAIRS)
    expert = -1
    if my_row >= 0:
        expert = tl.load(ids_ptr + my_row * TOP_K + mine % TOP_K)
    pairs = tl.histogram(tl.where(experts < 0, BINS - 1, experts), BINS)
    number = tl.arange(0, BINS)
    needed = tl.where(number < BINS - 1, (pairs + MEMBERS - 1) // MEMBERS, 0)
    if mine == 0:
        tl.store(list_ptr, tl.sum(needed))
    same = (experts == expert) & (expert >= 0)
    rank = tl.sum((same & (tl.arange(0, PAIRS) < mine)).to(tl.int32))
    if (expert >= 0) & (rank % MEMBERS == 0):
        unit = tl.sum(tl.where(number < expert, needed, 0)) + rank // MEMBERS
        list_ptr += (1 + unit) * RECORD
        tl.store(list_ptr, expert)
        tl.store(list_ptr + 1, tl.minimum(tl.sum(same.to(tl.int32)) - rank, MEMBERS))
        place = tl.cumsum(same.to(tl.int32), 0) - 1 - rank
        wanted = same & (place >= 0) & (place < MEMBERS)
        tl.store(list_ptr + MEMBERS + place, tl.arange(0, PAIRS), mask=wanted)
        tl.store(list_ptr + 2 * MEMBERS + place, row.to(tl.int32), mask=wanted)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(
    parts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    index_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    scaling: tl.tensor,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    if EARLY:
        tl.extra.cuda.gdc_wait()
    slot = tl.program_id(0)
    row = tl.load(index_ptr + slot)
    if row < 0:
        return
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < H
    total = tl.zeros((BN,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        here = tl.load(ids_ptr + row * TOP_K + j) >= 0
        part_ptr = parts_ptr + (slot * TOP_K + j).to(tl.int64) * H + column
        total += tl.load(part_ptr, mask=inside & here, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + column, (total * scaling).to(tl.bfloat16), mask=inside)
