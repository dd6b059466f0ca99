"""``expert_rows.py`` for packed weights, as ``packed_warps.py`` reads them: each warp its own, straight into registers.

A program has some weight rows (of gate and of up each, in the first product) and a unit: an expert and up to
``MEMBERS`` pairs of it, a pair being a row and one of its experts (``expert_units.py``).  Its warps share K; their FP32
sums are added at the end.  How K is ordered, and why no packed byte goes through shared memory: ``packed_warps.py``.

The numbers of a pair do not depend on where in which unit it is, nor on how many rows there are: ``TILES`` of a format
differ in weight rows alone.

From SM90 on a kernel starts while the one before it ends (programmatic dependent launch): what the second product
reads of its weights first, it reads before it waits for the first.

For a Triton that keeps what warps read in registers (``packed_tiles.STRAIGHT``): ``serves``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.experts.base import Form
from mixquant_sglang.kernels.limits import BLOCK, FEW_ROWS
from mixquant_sglang.kernels.triton.expert_matrix import Matrix
from mixquant_sglang.kernels.triton.expert_units import MEMBERS, RECORD, combine, list_units
from mixquant_sglang.kernels.triton.grid import e4m3_value
from mixquant_sglang.kernels.triton.grouped import activated
from mixquant_sglang.kernels.triton.launch import sm
from mixquant_sglang.kernels.triton.packed_tiles import STRAIGHT, Warps, _fitting_warps
from mixquant_sglang.kernels.triton.packed_warps import _matrix
from mixquant_sglang.kernels.triton.widen import e2m1_pairs, e4m3_pairs

LANES = 512  # programs that share the units of a tile, at most
# (format, one slot) -> the first and the second product's; of a sweep with the experts of Qwen3-30B-A3B on an H200
# (Triton 3.6, November 2026).  A change of pieces or warps is one of bits, so FP8's one slot has those of more: the
# sweep's best took 18.4 us a layer, these take 19.3.
TILES = {
    ("fp8", True): (Warps(8, 2, 4), Warps(16, 2, 2)),
    ("fp8", False): (Warps(16, 2, 4), Warps(32, 2, 2)),
    ("nvfp4", True): (Warps(16, 1, 4), Warps(16, 1, 2)),
    ("nvfp4", False): (Warps(16, 1, 4), Warps(32, 1, 2)),
}


def serves() -> bool:
    """Whether this Triton compiles it to what it was made for."""
    return STRAIGHT


def warp_rows_(
    out: torch.Tensor,
    index: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: Matrix,
    w2: Matrix,
    form: Form,
    *,
    tiles: tuple[Warps, Warps] | None = None,
) -> None:
    """As ``expert_rows.matrix_rows_``, of FP8 or NVFP4 weights, with the same errors.  ``tiles``: others than the
    measured ones."""
    (slots,), (_, k), fmt = index.shape, ids.shape, w13.format
    (experts, n, _), h = w13.codes.shape, w2.codes.shape[1]
    i, multiple = n // 2, 2 * BLOCK if fmt == "nvfp4" else BLOCK
    if fmt == "bf16" or slots > FEW_ROWS or i % multiple or h % multiple:
        raise ValueError(
            f"packed weights, at most {FEW_ROWS} rows and sizes of multiples of {multiple}, "
            f"got {fmt}, {slots} rows, [{i}, {h}]"
        )
    pairs, capability = slots * k, sm(x.device)
    early = capability >= 90
    hidden = torch.empty((pairs, i), dtype=torch.bfloat16, device=x.device)
    parts = torch.empty((pairs, h), dtype=torch.bfloat16, device=x.device)
    units = list_units(index, ids, experts, early=early) if slots > 1 else None
    lanes = min(LANES, pairs, experts + pairs // MEMBERS)  # there are no more units
    for matrix, read, written, weight, act, tile in zip(
        (w13, w2),
        (x, hidden),
        (hidden, parts),
        (weights, None) if form.weighted_input else (None, weights),
        (form.activation, ""),
        tiles or TILES[fmt, slots == 1],
        strict=True,
    ):
        depth, columns = read.shape[1], written.shape[1]
        width = depth if fmt == "fp8" else depth // 2  # bytes of a weight row
        fitting = _fitting_warps(tile, width)
        # Behind a kernel of ours alone: others do not say when what they leave may be read.
        options = {"launch_pdl": True} if early and (not act or units is not None) else {}
        _expert_warps[(triton.cdiv(columns, fitting.n), lanes)](
            read.view(torch.int32) if fmt == "nvfp4" else read,
            *(matrix.codes.view(torch.int32), matrix.scales, matrix.block_scales, matrix.bias, weight),
            *(written, units, index, ids, lanes, form.alpha, form.limit),
            TOP_K=k,
            MEMBERS=MEMBERS,
            RECORD=RECORD,
            EARLY=early,
            SM=capability,
            N=columns,
            K=depth,
            ACT=act,
            BN=fitting.n,
            PIECES=fitting.pieces,
            WARPS=fitting.warps,
            WHOLE_N=columns % fitting.n == 0,
            WHOLE_K=width % (64 * fitting.pieces * fitting.warps) == 0,
            num_warps=fitting.warps,
            num_stages=1,
            enable_fp_fusion=False,
            **options,
        )
    combine(out, index, ids, parts, form.scaling, early=early)


@triton.jit(do_not_specialize=["lanes"])  # type: ignore[untyped-decorator]
def _expert_warps(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    route_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    list_ptr: tl.tensor,
    index_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    lanes: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    TOP_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    RECORD: tl.constexpr,
    EARLY: tl.constexpr,
    SM: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    PIECES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
) -> None:
    """``out`` [pairs, N] of all pairs.  With ACT the first product: gate and up of ``x`` [T, K], activated; else the
    second, of ``x`` [pairs, K].  ``codes_ptr``: words of four bytes; of NVFP4 ``x_ptr`` is of pairs.  ``list_ptr``: of
    ``expert_units.py``; None with one slot, of which each pair is a unit."""
    lane = tl.program_id(1)
    member = tl.arange(0, MEMBERS)
    if list_ptr is not None:
        if EARLY and ACT != "":
            tl.extra.cuda.gdc_wait()
        units = tl.load(list_ptr, cache_modifier=".cg")  # past L1, which may hold the list of the layer before
    else:
        only = tl.load(index_ptr)
        units = tl.where(only >= 0, TOP_K, 0)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if lane >= units:
        if EARLY and ACT == "" and lane == 0:  # or this kernel could end before the one that it follows
            tl.extra.cuda.gdc_wait()
        return
    for unit in range(lane, units, lanes):
        if list_ptr is not None:
            record = list_ptr + (1 + unit) * RECORD
            expert = tl.load(record, cache_modifier=".cg")
            there = member < tl.load(record + 1, cache_modifier=".cg")
            pair = tl.load(record + MEMBERS + member, cache_modifier=".cg")
            row = tl.load(record + 2 * MEMBERS + member, cache_modifier=".cg")
        else:
            expert = tl.load(ids_ptr + only * TOP_K + unit)
            there = member == 0
            pair = unit + 0 * member
            row = only.to(tl.int32) + 0 * member
        if expert >= 0:  # of one slot, an expert of another rank is below
            _unit(
                x_ptr, codes_ptr, scale_ptr, block_scale_ptr, bias_ptr, route_weight_ptr, out_ptr, expert, pair, row,
                there, alpha, limit, TOP_K, MEMBERS, EARLY, SM, N, K, ACT, BN, PIECES, WARPS, WHOLE_N, WHOLE_K,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _unit(
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    block_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    route_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    expert: tl.tensor,
    pair: tl.tensor,
    row: tl.tensor,
    there: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    TOP_K: tl.constexpr,
    MEMBERS: tl.constexpr,
    EARLY: tl.constexpr,
    SM: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    PIECES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
) -> None:
    """The weight rows of this program and the pairs of a unit: ``pair``, ``row`` [MEMBERS], of which ``there`` are."""
    FP4: tl.constexpr = block_scale_ptr is not None
    GATED: tl.constexpr = ACT != ""
    ROWS: tl.constexpr = 2 * BN if GATED else BN
    H: tl.constexpr = ROWS // 8
    WIDTH: tl.constexpr = K // 8 if FP4 else K // 4
    STEP: tl.constexpr = 16 * PIECES * WARPS
    first = tl.program_id(0) * BN
    at_expert = expert.to(tl.int64) * (2 * N if GATED else N)
    # [t, g, w, h, piece, words of 4, or two scales]: as in ``packed_warps.py``
    thread = tl.arange(0, 4)[:, None, None, None, None, None]
    group = tl.arange(0, 8)[None, :, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None]
    h = tl.arange(0, H)[None, None, None, :, None, None]
    piece = tl.arange(0, PIECES)[None, None, None, None, :, None]
    n = first + h * 8 + group
    inside = n < N
    if GATED:  # gate's rows, then those of up
        n = first + (h % (BN // 8)) * 8 + group
        inside = n < N
        n += (h // (BN // 8)) * N
    place = (warp * PIECES + piece) * 16 + thread * 4
    at = place + tl.arange(0, 4)
    codes = codes_ptr + at_expert * WIDTH + (n * WIDTH + at)
    code = _read(codes, inside, at, 0, WIDTH, WHOLE_N, WHOLE_K)
    if FP4:
        scale_at = place // 2 + tl.arange(0, 2)
        scales = block_scale_ptr + at_expert * (WIDTH // 2) + (n * (WIDTH // 2) + scale_at)
        scale = _read(scales, inside, scale_at, 0, WIDTH // 2, WHOLE_N, WHOLE_K)
    # what the sums are multiplied by, before the loop that would make it wait
    column = first + tl.arange(0, ROWS)
    column_inside = column < N
    if GATED:
        column = first + tl.arange(0, ROWS) % BN
        column_inside = column < N
        column += (tl.arange(0, ROWS) // BN) * N
    factor = tl.load(scale_ptr + at_expert + column, mask=column_inside, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at_expert + column, mask=column_inside, other=0.0)
    if route_weight_ptr is not None:
        weight = tl.load(route_weight_ptr + row * TOP_K + pair % TOP_K, mask=there, other=0.0)
    if EARLY and not GATED:
        tl.extra.cuda.gdc_wait()
    M: tl.constexpr = MEMBERS // 8
    x_row = tl.permute(tl.reshape(row if GATED else pair, (M, 8)), (1, 0))[None, :, None, :, None, None, None]
    xs = x_ptr + x_row.to(tl.int64) * (K // 2 if FP4 else K)  # times K last, so that the compiler sees what divides it
    wanted = tl.permute(tl.reshape(there, (M, 8)), (1, 0))[None, :, None, :, None, None, None]
    total = tl.zeros((WARPS, ROWS, MEMBERS), dtype=tl.float32)
    for start in range(0, WIDTH, STEP):
        # The next step's bytes are on their way while this one's are multiplied.
        next_code = _read(codes, inside, at, start + STEP, WIDTH, WHOLE_N, WHOLE_K)
        if FP4:
            next_scale = _read(scales, inside, scale_at, (start + STEP) // 2, WIDTH // 2, WHOLE_N, WHOLE_K)
        x = _columns(xs, wanted, start, WIDTH, M, PIECES, WARPS, WHOLE_K, FP4)
        if FP4:
            power = e4m3_value(scale.to(tl.int32) & 0x7F) * 6.646139978924579e35  # 2^119
            power = (power.to(tl.int32, bitcast=True) >> 16) * 0x10001  # BF16 holds it
            power = tl.broadcast_to(power[:, :, :, :, :, :, None], (4, 8, WARPS, H, PIECES, 2, 2))
            power = tl.reshape(power, (4, 8, WARPS, H, PIECES, 4))
            even_low, even_high, odd_low, odd_high = e2m1_pairs(code, power, SM)
            even = _matrix(even_low, even_high, ROWS, PIECES, WARPS)
            odd = _matrix(odd_low, odd_high, ROWS, PIECES, WARPS)
            pairs = _operand(x, M, PIECES, WARPS, FP4)
            total = tl.dot(even, pairs.to(tl.int16).to(tl.bfloat16, bitcast=True), total)
            total = tl.dot(odd, (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), total)
            scale = next_scale
        else:
            low, high = e4m3_pairs(code, SM)
            total = tl.dot(_matrix(low, high, ROWS, PIECES, WARPS), _operand(x, M, PIECES, WARPS, FP4), total)
        code = next_code
    result = tl.sum(total, axis=0)
    if FP4:
        factor *= 128.0  # 2^7: see ``widen.py``
    result *= factor[:, None]
    if bias_ptr is not None:
        result += bias[:, None]
    if route_weight_ptr is not None:
        result *= weight[None, :]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (2, BN, MEMBERS)), (1, 2, 0)))
        result = activated(gate, up, alpha, limit, ACT)
    column = first + tl.arange(0, BN)
    mask = there[None, :] & (column[:, None] < N)
    tl.store(out_ptr + pair[None, :].to(tl.int64) * N + column[:, None], result.to(tl.bfloat16), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _read(
    pointers: tl.tensor,
    inside: tl.tensor,
    at: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_K: tl.constexpr,
) -> tl.tensor:
    """``start`` places behind ``pointers``, which are at ``at``; zeros beyond ``WIDTH``."""
    there = start < WIDTH if WHOLE_K else at + start < WIDTH
    if not WHOLE_N:
        there = there & inside
    return tl.load(pointers + start, mask=there, other=0, eviction_policy="evict_first")


@triton.jit  # type: ignore[untyped-decorator]
def _columns(
    xs: tl.tensor,
    wanted: tl.tensor,
    start: tl.tensor,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    PIECES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    FP4: tl.constexpr,
) -> tl.tensor:
    """Of the rows at ``xs``, [t, member % 8, w, member // 8, s, piece, 4 p + 2 c + b], or, of pairs, [t, member % 8, w,
    member // 8, 2 s + p, piece, 2 c + b]: the names of ``packed_warps.py``."""
    PARTS: tl.constexpr = 4 if FP4 else 2
    thread = tl.arange(0, 4)[:, None, None, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None, None]
    part = tl.arange(0, PARTS)[None, None, None, None, :, None, None]
    piece = tl.arange(0, PIECES)[None, None, None, None, None, :, None]
    at = start * 4 + (warp * PIECES + piece) * 64 + thread * 16 + part * (16 // PARTS) + tl.arange(0, 16 // PARTS)
    if not WHOLE_K:
        wanted = wanted & (at < WIDTH * 4)
    return tl.load(xs + at, mask=wanted, other=0, eviction_policy="evict_last")


@triton.jit  # type: ignore[untyped-decorator]
def _operand(x: tl.tensor, M: tl.constexpr, PIECES: tl.constexpr, WARPS: tl.constexpr, FP4: tl.constexpr) -> tl.tensor:
    """[w, 64 piece + 32 s + 16 p + 4 t + 2 c + b, member] of what ``_columns`` has read."""
    if FP4:
        named = tl.permute(tl.reshape(x, (4, 8, WARPS, M, 2, 2, PIECES, 4)), (2, 6, 4, 5, 0, 7, 3, 1))
    else:
        named = tl.permute(tl.reshape(x, (4, 8, WARPS, M, 2, PIECES, 2, 4)), (2, 5, 4, 6, 0, 7, 3, 1))
    return tl.reshape(named, (WARPS, 64 * PIECES, 8 * M))
