"""The experts of a few BF16 rows, written over their rows of another result: protected rows, and decode from packed
weights.

    out[t] = scaling * sum_j weights[t, j] * (act(x[t] @ gate[e].T, x[t] @ up[e].T) @ down[e].T),  e = ids[t, j]

for t = index[r] >= 0.  Three kernels, from the router's choice as it stands: no row is sorted or copied.  A pair is a
row and one of its experts.  Each weight is read once: the first pair of an expert multiplies for all pairs of it, 16 at
a time.  How many rows there are is seen when the kernels run, so a captured pass with one protected row reads the
weights of its experts and no others.  Rounded to BF16 where SGLang's own run is: gate, up, the activation, each
expert's weighted result, the sum.

Weights are BF16, FP8 or NVFP4; packed ones become BF16 in registers, which is exact, and their scales are applied to
the FP32 sum.  With these gate and up are not rounded before the activation (``experts/weight_only.py``).

SGLang's run of few rows picks them, sorts them and takes five kernels: ``docs/kernels.md``.

Refused (ValueError): more than 64 slots, sizes that are not multiples of 16, or of 32 with NVFP4.  CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.experts.base import Form, Masters
from mixquant_sglang.kernels.limits import BLOCK, FEW_ROWS
from mixquant_sglang.kernels.triton.expert_matrix import Matrix
from mixquant_sglang.kernels.triton.expert_units import BUCKETS, _experts_of_pairs, combine
from mixquant_sglang.kernels.triton.grid import e4m3_value
from mixquant_sglang.kernels.triton.grouped import activated
from mixquant_sglang.kernels.triton.launch import sm
from mixquant_sglang.kernels.triton.widen import e2m1_to_bf16, e4m3_to_bf16

MEMBERS = 16  # pairs of an expert at a time: the least rows that tensor cores take
LANES = 32  # programs that share the pairs of a tile


def expert_rows_(
    out: torch.Tensor,
    index: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    masters: Masters,
    form: Form,
) -> None:
    """``matrix_rows_`` of BF16 weights."""
    first, second = Matrix(masters.w13, masters.bias13), Matrix(masters.w2, masters.bias2)
    matrix_rows_(out, index, x, weights, ids, first, second, form)


def matrix_rows_(
    out: torch.Tensor,
    index: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: Matrix,
    w2: Matrix,
    form: Form,
) -> None:
    """In place: out bfloat16 [T, H], index int64 [R] (-1 for unused slots, at its end), x bfloat16 [T, H], weights
    float32 and ids int32 [T, k] (-1: another rank's), all contiguous.  Row numbers are not checked against T.

    No synchronisation, fit for CUDA graphs."""
    (slots,), (_, k) = index.shape, ids.shape
    (_, n, _), h, fmt = w13.codes.shape, w2.codes.shape[1], w13.format
    i, multiple = n // 2, 2 * BLOCK if fmt == "nvfp4" else BLOCK
    if slots > FEW_ROWS or i % multiple or h % multiple:
        raise ValueError(f"at most {FEW_ROWS} rows and sizes of multiples of {multiple}, got {slots} rows, [{i}, {h}]")
    pairs, most = slots * k, next(bucket for bucket in BUCKETS if slots <= bucket)
    hidden = torch.empty((pairs, i), dtype=torch.bfloat16, device=x.device)
    parts = torch.empty((pairs, h), dtype=torch.bfloat16, device=x.device)
    common = {"TOP_K": k, "PAIRS": max(triton.next_power_of_2(most * k), MEMBERS), "SLOTS": most}
    common |= {"MEMBERS": MEMBERS, "LANES": LANES, "FORMAT": fmt, "SM": sm(x.device)}
    lanes = min(LANES, pairs)
    _up[(triton.cdiv(i, 32), lanes)](
        x.view(torch.int32) if fmt == "nvfp4" else x,
        *(w13.codes, w13.scales, w13.block_scales, w13.bias, weights if form.weighted_input else None),
        *(hidden, index, ids, slots, form.alpha, form.limit),
        **common,
        I=i,
        H=h,
        ACT=form.activation,
        INTERLEAVED=form.interleaved and fmt == "bf16",
        BN=32,
        BK=_depth(h, multiple),
        num_warps=4,
        num_stages=4,
    )
    _down[(triton.cdiv(h, 64), lanes)](
        hidden.view(torch.int32) if fmt == "nvfp4" else hidden,
        *(w2.codes, w2.scales, w2.block_scales, w2.bias, None if form.weighted_input else weights),
        *(parts, index, ids, slots),
        **common,
        I=i,
        H=h,
        BN=64,
        BK=_depth(i, multiple),
        num_warps=4,
        num_stages=4,
    )
    combine(out, index, ids, parts, form.scaling, early=False)


def _depth(k: int, least: int) -> int:
    return 128 if k % 128 == 0 else 64 if k % 64 == 0 else least


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


@triton.jit  # type: ignore[untyped-decorator]
def _rows(
    x_ptr: tl.tensor,
    row: tl.tensor,
    there: tl.tensor,
    k: tl.tensor,
    K: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """BF16 [MEMBERS, BK] of x [., K] from ``k`` on; with NVFP4 weights int32 pairs of them [MEMBERS, BK/2]."""
    if FORMAT == "nvfp4":
        pair = k // 2 + tl.arange(0, BK // 2)
        return tl.load(x_ptr + row[:, None] * (K // 2) + pair[None, :], mask=there[:, None], other=0)
    else:
        column = k + tl.arange(0, BK)
        return tl.load(x_ptr + row[:, None] * K + column[None, :], mask=there[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _add(
    total: tl.tensor,
    x: tl.tensor,
    codes_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
    at: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    k: tl.tensor,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FORMAT: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tensor:
    """``total`` [MEMBERS, BN] and ``x`` [MEMBERS, BK] times the rows ``at`` + ``row`` [BN] of weights [E * N, K], from
    ``k`` on; of NVFP4 x is int32 pairs: all even numbers are multiplied, then all odd ones."""
    if FORMAT == "nvfp4":
        half = row[None, :] * (K // 2) + (k // 2 + tl.arange(0, BK // 2))[:, None]
        block = row[None, :] * (K // 16) + (k // 16 + tl.arange(0, BK // 16))[:, None]
        code = tl.load(codes_ptr + at * (K // 2) + half, mask=inside[None, :], other=0)
        scale = tl.load(block_scale_ptr + at * (K // 16) + block, mask=inside[None, :], other=0)
        scale = (e4m3_value(scale.to(tl.int32) & 0x7F) * 6.646139978924579e35).to(tl.bfloat16)  # 2^119
        scale = tl.broadcast_to(scale[:, None, :], (BK // 16, 8, BN)).reshape(BK // 2, BN)
        even, odd = e2m1_to_bf16(code, scale, SM)
        total = tl.dot(x.to(tl.int16).to(tl.bfloat16, bitcast=True), even, acc=total)
        return tl.dot((x >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), odd, acc=total)
    else:
        tile_ptr = codes_ptr + at * K + row[None, :] * K + (k + tl.arange(0, BK))[:, None]
        if FORMAT == "fp8":
            tile = e4m3_to_bf16(tl.load(tile_ptr, mask=inside[None, :], other=0), SM)
        else:
            tile = tl.load(tile_ptr, mask=inside[None, :], other=0.0)
        return tl.dot(x, tile, acc=total)


@triton.jit  # type: ignore[untyped-decorator]
def _scaled(
    total: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    at: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """The sum times the scales of these rows, and their bias."""
    if FORMAT != "bf16":
        scale = tl.load(scale_ptr + at + row, mask=inside, other=0.0)[None, :]
        if FORMAT == "nvfp4":
            scale *= 128.0  # 2^7: see ``widen.py``
        total *= scale
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at + row, mask=inside, other=0.0)[None, :]
    return total


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def _up(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
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
    FORMAT: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    slot = tl.arange(0, SLOTS)
    used = tl.sum((tl.load(index_ptr + slot, mask=slot < slots, other=-1) >= 0).to(tl.int32))
    if tl.program_id(1) >= used * TOP_K:
        return
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = column < I
    gate_row = column * 2 if INTERLEAVED else column
    up_row = column * 2 + 1 if INTERLEAVED else column + I
    row, experts = _experts_of_pairs(index_ptr, ids_ptr, slots, TOP_K, PAIRS)
    for mine in range(tl.program_id(1), used * TOP_K, LANES):
        expert = tl.sum(tl.where(tl.arange(0, PAIRS) == mine, experts, 0))
        same = experts == expert
        first = tl.min(tl.where(same, tl.arange(0, PAIRS), PAIRS))
        if (expert >= 0) & (first == mine):
            at = expert.to(tl.int64) * (2 * I)
            for begin in range(0, tl.sum(same.to(tl.int32)), MEMBERS):
                pair, member_row, there = _members(row, same, begin, PAIRS, MEMBERS)
                gate = tl.zeros((MEMBERS, BN), dtype=tl.float32)
                up = tl.zeros((MEMBERS, BN), dtype=tl.float32)
                for k in range(0, H, BK):
                    x = _rows(x_ptr, member_row, there, k, H, BK, FORMAT)
                    gate = _add(gate, x, weight_ptr, block_scale_ptr, at, gate_row, inside, k, H, BN, BK, FORMAT, SM)
                    up = _add(up, x, weight_ptr, block_scale_ptr, at, up_row, inside, k, H, BN, BK, FORMAT, SM)
                gate = _scaled(gate, scale_ptr, bias_ptr, at, gate_row, inside, FORMAT)
                up = _scaled(up, scale_ptr, bias_ptr, at, up_row, inside, FORMAT)
                if route_weight_ptr is not None:
                    weight = tl.load(route_weight_ptr + member_row * TOP_K + pair % TOP_K, mask=there, other=0.0)
                    gate *= weight[:, None]
                    up *= weight[:, None]
                if FORMAT == "bf16":
                    gate = gate.to(tl.bfloat16).to(tl.float32)
                    up = up.to(tl.bfloat16).to(tl.float32)
                result = activated(gate, up, alpha, limit, ACT).to(tl.bfloat16)
                wanted = there[:, None] & inside[None, :]
                tl.store(out_ptr + pair[:, None] * I + column[None, :], result, mask=wanted)


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def _down(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
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
    FORMAT: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    slot = tl.arange(0, SLOTS)
    used = tl.sum((tl.load(index_ptr + slot, mask=slot < slots, other=-1) >= 0).to(tl.int32))
    if tl.program_id(1) >= used * TOP_K:
        return
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = column < H
    row, experts = _experts_of_pairs(index_ptr, ids_ptr, slots, TOP_K, PAIRS)
    for mine in range(tl.program_id(1), used * TOP_K, LANES):
        expert = tl.sum(tl.where(tl.arange(0, PAIRS) == mine, experts, 0))
        same = experts == expert
        first = tl.min(tl.where(same, tl.arange(0, PAIRS), PAIRS))
        if (expert >= 0) & (first == mine):
            at = expert.to(tl.int64) * H
            for begin in range(0, tl.sum(same.to(tl.int32)), MEMBERS):
                pair, member_row, there = _members(row, same, begin, PAIRS, MEMBERS)
                total = tl.zeros((MEMBERS, BN), dtype=tl.float32)
                for k in range(0, I, BK):
                    x = _rows(x_ptr, pair, there, k, I, BK, FORMAT)
                    total = _add(total, x, weight_ptr, block_scale_ptr, at, column, inside, k, I, BN, BK, FORMAT, SM)
                total = _scaled(total, scale_ptr, bias_ptr, at, column, inside, FORMAT)
                if route_weight_ptr is not None:
                    weight = tl.load(route_weight_ptr + member_row * TOP_K + pair % TOP_K, mask=there, other=0.0)
                    total *= weight[:, None]
                wanted = there[:, None] & inside[None, :]
                tl.store(out_ptr + pair[:, None] * H + column[None, :], total.to(tl.bfloat16), mask=wanted)
