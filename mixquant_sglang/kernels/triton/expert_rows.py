"""The experts of a few protected rows in BF16, written over their rows of a low-precision result.

    out[t] = scaling * sum_j weights[t, j] * (act(x[t] @ gate[e].T, x[t] @ up[e].T) @ down[e].T),  e = ids[t, j]

for t = index[r] >= 0.  Three kernels, from the router's choice as it stands: no row is sorted or copied.  A pair is a
row and one of its experts.  Each weight is read once: the first pair of an expert multiplies for all pairs of it, 16 at
a time.  How many rows there are is seen when the kernels run, so a captured pass with one protected row reads the
weights of its experts and no others.  Rounded to BF16 where SGLang's own run is: gate, up, the activation, each
expert's weighted result, the sum.

SGLang's run of few rows picks them, sorts them and takes five kernels: ``docs/kernels.md``.

Refused (ValueError): more than 64 slots, sizes that are not multiples of 16.  CUDA only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.beside import Beside
from mixquant_sglang.kernels.experts.base import Form, Masters
from mixquant_sglang.kernels.limits import BLOCK, FEW_ROWS
from mixquant_sglang.kernels.triton.grouped import activated

MEMBERS = 16  # pairs of an expert at a time: the least rows that tensor cores take
LANES = 32  # programs that share the pairs of a tile
BUCKETS = (1, 16, FEW_ROWS)  # slots: what kernels are compiled for


def expert_rows_(
    out: torch.Tensor,
    index: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    masters: Masters,
    form: Form,
) -> None:
    """In place: out bfloat16 [T, H], index int64 [R] (-1 for unused slots, at its end), x bfloat16 [T, H], weights
    float32 and ids int32 [T, k] (-1: another rank's), all contiguous.  Row numbers are not checked against T.

    No synchronisation, fit for CUDA graphs."""
    combine_(out, multiply(index, x, weights, ids, masters, form, scratch(index, ids, masters)), index, ids, form)


def with_rows(
    low: Callable[[], torch.Tensor],
    index: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    masters: Masters,
    form: Form,
) -> torch.Tensor:
    """The result of ``low``, [T, H], with the rows of ``index`` as ``expert_rows_`` has them; their weights are read
    meanwhile, where a CUDA graph is captured."""
    room, branch = scratch(index, ids, masters), Beside(x.device)
    with branch.run():
        parts = multiply(index, x, weights, ids, masters, form, room)
    out = low()
    branch.join()
    combine_(out, parts, index, ids, form)
    return out


def scratch(index: torch.Tensor, ids: torch.Tensor, masters: Masters) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations bfloat16 [R k, I] and results bfloat16 [R k, H] of all pairs, for ``multiply``."""
    pairs = len(index) * ids.shape[1]
    _, h, i = masters.w2.shape
    hidden = torch.empty((pairs, i), dtype=torch.bfloat16, device=ids.device)
    return hidden, torch.empty((pairs, h), dtype=torch.bfloat16, device=ids.device)


def multiply(
    index: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    masters: Masters,
    form: Form,
    room: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The first two of the three kernels: results of all pairs, in ``room``; arguments as of ``expert_rows_``."""
    (slots,), (_, k) = index.shape, ids.shape
    _, n, h = masters.w13.shape
    i = n // 2
    if slots > FEW_ROWS or i % BLOCK or h % BLOCK:
        raise ValueError(f"at most {FEW_ROWS} rows and sizes of multiples of {BLOCK}, got {slots} rows, [{i}, {h}]")
    pairs, most = slots * k, next(bucket for bucket in BUCKETS if slots <= bucket)
    hidden, parts = room
    common = {"TOP_K": k, "PAIRS": max(triton.next_power_of_2(most * k), MEMBERS), "SLOTS": most}
    common |= {"MEMBERS": MEMBERS, "LANES": LANES}
    lanes = min(LANES, pairs)
    _up[(triton.cdiv(i, 32), lanes)](
        *(x, masters.w13, masters.bias13, weights if form.weighted_input else None, hidden, index, ids, slots),
        *(form.alpha, form.limit),
        **common,
        I=i,
        H=h,
        ACT=form.activation,
        INTERLEAVED=form.interleaved,
        BN=32,
        BK=_depth(h),
        num_warps=4,
        num_stages=4,
    )
    _down[(triton.cdiv(h, 64), lanes)](
        *(hidden, masters.w2, masters.bias2, None if form.weighted_input else weights, parts, index, ids, slots),
        **common,
        I=i,
        H=h,
        BN=64,
        BK=_depth(i),
        num_warps=4,
        num_stages=4,
    )
    return parts


def combine_(out: torch.Tensor, parts: torch.Tensor, index: torch.Tensor, ids: torch.Tensor, form: Form) -> None:
    """The third: each row's sum over its pairs in ``parts``, into its row of ``out``."""
    (slots,), (_, k), h = index.shape, ids.shape, out.shape[1]
    _combine[(slots, triton.cdiv(h, 1024))](parts, out, index, ids, form.scaling, H=h, TOP_K=k, BN=1024, num_warps=4)


def _depth(k: int) -> int:
    return 128 if k % 128 == 0 else 64 if k % 64 == 0 else 16


@triton.jit  # type: ignore[untyped-decorator]
def _experts_of_pairs(
    index_ptr: tl.tensor, ids_ptr: tl.tensor, slots: tl.tensor, TOP_K: tl.constexpr, PAIRS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """int64 rows and int32 experts of all pairs [PAIRS]; -1 where there is none."""
    pair = tl.arange(0, PAIRS)
    row = tl.load(index_ptr + pair // TOP_K, mask=pair < slots * TOP_K, other=-1)
    return row, tl.load(ids_ptr + row * TOP_K + pair % TOP_K, mask=row >= 0, other=-1)


@triton.jit  # type: ignore[untyped-decorator]
def _members(
    row: tl.tensor, same: tl.tensor, begin: tl.tensor, PAIRS: tl.constexpr, MEMBERS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """From the ``begin``-th on, MEMBERS of the pairs that are ``same``: their numbers, rows, and which there are."""
    place = tl.cumsum(same.to(tl.int32), 0) - 1 - begin
    chosen = same[None, :] & (place[None, :] == tl.arange(0, MEMBERS)[:, None])
    pair = tl.sum(tl.where(chosen, tl.arange(0, PAIRS)[None, :], 0), 1)
    member_row = tl.sum(tl.where(chosen, row[None, :], 0), 1)
    return pair, member_row, tl.sum(chosen.to(tl.int32), 1) > 0


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def _up(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    route_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    index_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    slots: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    SLOTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    LANES: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    H: tl.constexpr,
    ACT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    slot = tl.arange(0, SLOTS)
    used = tl.sum((tl.load(index_ptr + slot, mask=slot < slots, other=-1) >= 0).to(tl.int32))
    if tl.program_id(1) >= used * TOP_K:
        return
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    inside = column < I
    gate_row = column * 2 if INTERLEAVED else column
    up_row = column * 2 + 1 if INTERLEAVED else column + I
    row, experts = _experts_of_pairs(index_ptr, ids_ptr, slots, TOP_K, PAIRS)
    for mine in range(tl.program_id(1), used * TOP_K, LANES):
        expert = tl.sum(tl.where(tl.arange(0, PAIRS) == mine, experts, 0))
        same = experts == expert
        first = tl.min(tl.where(same, tl.arange(0, PAIRS), PAIRS))
        if (expert >= 0) & (first == mine):
            base = weight_ptr + expert.to(tl.int64) * (2 * I * H)
            for begin in range(0, tl.sum(same.to(tl.int32)), MEMBERS):
                pair, member_row, there = _members(row, same, begin, PAIRS, MEMBERS)
                gate = tl.zeros((MEMBERS, BN), dtype=tl.float32)
                up = tl.zeros((MEMBERS, BN), dtype=tl.float32)
                for k in range(0, H, BK):
                    x = tl.load(x_ptr + member_row[:, None] * H + (k + depth)[None, :], mask=there[:, None], other=0.0)
                    place = (k + depth)[:, None]
                    gate_tile = tl.load(base + gate_row[None, :] * H + place, mask=inside[None, :], other=0.0)
                    up_tile = tl.load(base + up_row[None, :] * H + place, mask=inside[None, :], other=0.0)
                    gate = tl.dot(x, gate_tile, acc=gate)
                    up = tl.dot(x, up_tile, acc=up)
                if bias_ptr is not None:
                    bias = bias_ptr + expert.to(tl.int64) * (2 * I)
                    gate += tl.load(bias + gate_row, mask=inside, other=0.0)[None, :]
                    up += tl.load(bias + up_row, mask=inside, other=0.0)[None, :]
                if route_weight_ptr is not None:
                    weight = tl.load(route_weight_ptr + member_row * TOP_K + pair % TOP_K, mask=there, other=0.0)
                    gate *= weight[:, None]
                    up *= weight[:, None]
                gate = gate.to(tl.bfloat16).to(tl.float32)
                up = up.to(tl.bfloat16).to(tl.float32)
                result = activated(gate, up, alpha, limit, ACT).to(tl.bfloat16)
                wanted = there[:, None] & inside[None, :]
                tl.store(out_ptr + pair[:, None] * I + column[None, :], result, mask=wanted)


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def _down(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    route_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    index_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    slots: tl.tensor,
    TOP_K: tl.constexpr,
    PAIRS: tl.constexpr,
    SLOTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    LANES: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    H: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    slot = tl.arange(0, SLOTS)
    used = tl.sum((tl.load(index_ptr + slot, mask=slot < slots, other=-1) >= 0).to(tl.int32))
    if tl.program_id(1) >= used * TOP_K:
        return
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    inside = column < H
    row, experts = _experts_of_pairs(index_ptr, ids_ptr, slots, TOP_K, PAIRS)
    for mine in range(tl.program_id(1), used * TOP_K, LANES):
        expert = tl.sum(tl.where(tl.arange(0, PAIRS) == mine, experts, 0))
        same = experts == expert
        first = tl.min(tl.where(same, tl.arange(0, PAIRS), PAIRS))
        if (expert >= 0) & (first == mine):
            base = weight_ptr + expert.to(tl.int64) * (H * I)
            for begin in range(0, tl.sum(same.to(tl.int32)), MEMBERS):
                pair, member_row, there = _members(row, same, begin, PAIRS, MEMBERS)
                total = tl.zeros((MEMBERS, BN), dtype=tl.float32)
                for k in range(0, I, BK):
                    x = tl.load(x_ptr + pair[:, None] * I + (k + depth)[None, :], mask=there[:, None], other=0.0)
                    tile_ptr = base + column[None, :] * I + (k + depth)[:, None]
                    total = tl.dot(x, tl.load(tile_ptr, mask=inside[None, :], other=0.0), acc=total)
                if bias_ptr is not None:
                    total += tl.load(bias_ptr + expert.to(tl.int64) * H + column, mask=inside, other=0.0)[None, :]
                if route_weight_ptr is not None:
                    weight = tl.load(route_weight_ptr + member_row * TOP_K + pair % TOP_K, mask=there, other=0.0)
                    total *= weight[:, None]
                wanted = there[:, None] & inside[None, :]
                tl.store(out_ptr + pair[:, None] * H + column[None, :], total.to(tl.bfloat16), mask=wanted)


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
) -> None:
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
