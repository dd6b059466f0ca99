"""One product for each expert of a mixture: rows of activations, each times the weight of its expert.

Route r = t * k + j is token t's j-th expert.  ``order`` has the routes sorted by expert, padded so that a block of BM
routes has one expert, which ``experts`` names (``sgl_kernel.moe_align_block_size``).

Two kinds, in one kernel:

* gated: ``out[r] = act(gate) * up`` with ``gate, up = x[t] @ weight[e].T`` cut in halves: two accumulators, so that the
  result before the activation is never written;
* plain: ``out[r] = route_weight[r] * (x[r] @ weight[e].T)``; routes of experts that are elsewhere (-1) give zeros.

Operands are FP8 or BF16 codes with FP32 scales of rows and channels, applied to the FP32 sum.  BF16 rows take FP8
weights too, widened in registers: E4M3 is exact in BF16.  A row's numbers depend on that row, its expert and the tile
sizes.  Nothing synchronises, everything can be captured in a CUDA graph.

SGLang's ``fused_moe_kernel`` and DeepGEMM's grouped GEMM do the plain kind: ``docs/kernels.md`` has the timings.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["routes"])  # type: ignore[untyped-decorator]
def grouped_matmul(
    x_ptr: tl.tensor,
    weight: tl.tensor,
    out_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    route_weight_ptr: tl.tensor,
    order_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    used_ptr: tl.tensor,
    routes: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARE: tl.constexpr,
    ACT: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
) -> None:
    """``weight`` [experts * N, K] is a descriptor with TMA, else a pointer; a route's row of x: ``route // SHARE``.

    With HALVES a block with BM // 2 routes or fewer, the last of its expert, multiplies half as many rows."""
    COLUMNS: tl.constexpr = N // 2 if ACT != "" else N
    TILES: tl.constexpr = (COLUMNS + BN - 1) // BN
    pid = tl.program_id(0)
    blocks = tl.load(used_ptr) // BM
    if pid >= blocks * TILES:
        return
    group = pid // (GROUP * TILES)
    first = group * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inner = pid % (GROUP * TILES)
    block = first + inner % size
    tile = inner // size
    expert = tl.load(expert_ptr + block)
    order_ptr += block * BM
    few = False
    if HALVES:
        few = tl.load(order_ptr + BM // 2) >= routes  # the routes that there are come first
    if few:
        _block(
            *(x_ptr, weight, out_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, route_weight_ptr, order_ptr),
            *(expert, tile, routes, alpha, limit, N, K, SHARE, ACT, TMA, BM // 2, BN, BK),
        )
    else:
        _block(
            *(x_ptr, weight, out_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, route_weight_ptr, order_ptr),
            *(expert, tile, routes, alpha, limit, N, K, SHARE, ACT, TMA, BM, BN, BK),
        )


@triton.jit  # type: ignore[untyped-decorator]
def _block(
    x_ptr: tl.tensor,
    weight: tl.tensor,
    out_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    route_weight_ptr: tl.tensor,
    order_ptr: tl.tensor,
    expert: tl.tensor,
    tile: tl.tensor,
    routes: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARE: tl.constexpr,
    ACT: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """BM routes from ``order_ptr`` on, times the ``tile``-th BN columns of ``expert``."""
    GATED: tl.constexpr = ACT != ""
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    route = tl.load(order_ptr + tl.arange(0, BM))
    live = route < routes
    column = tile * BN + tl.arange(0, BN)
    out_ptrs = out_ptr + route.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    wanted = live[:, None] & (column < COLUMNS)[None, :]
    if expert < 0:
        if not GATED:
            tl.store(out_ptrs, tl.zeros((BM, BN), dtype=tl.bfloat16), mask=wanted)
    else:
        depth = tl.arange(0, BK)
        x_ptrs = x_ptr + (route // SHARE).to(tl.int64)[:, None] * K + depth[None, :]
        row = expert * N + tile * BN
        total = tl.zeros((BM, BN), dtype=tl.float32)
        second = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            if K % BK == 0:
                x = tl.load(x_ptrs, mask=live[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs, mask=live[:, None] & (depth < K - k)[None, :], other=0.0)
            x_ptrs += BK
            total = tl.dot(x, _tile(weight, row, k, column, COLUMNS, K, BN, BK, TMA).to(x.dtype).T, acc=total)
            if GATED:
                up = _tile(weight, row + COLUMNS, k, column, COLUMNS, K, BN, BK, TMA).to(x.dtype)
                second = tl.dot(x, up.T, acc=second)
        scale_ptr = weight_scale_ptr + expert.to(tl.int64) * N + column
        if x_scale_ptr is not None:
            scale = tl.load(x_scale_ptr + route // SHARE, mask=live, other=0.0)[:, None]
            total *= scale
            second *= scale
        total *= tl.load(scale_ptr, mask=column < COLUMNS, other=0.0)[None, :]
        if bias_ptr is not None:
            total += tl.load(bias_ptr + expert.to(tl.int64) * N + column, mask=column < COLUMNS, other=0.0)[None, :]
        if GATED:
            second *= tl.load(scale_ptr + COLUMNS, mask=column < COLUMNS, other=0.0)[None, :]
            if bias_ptr is not None:
                up_bias_ptr = bias_ptr + expert.to(tl.int64) * N + COLUMNS + column
                second += tl.load(up_bias_ptr, mask=column < COLUMNS, other=0.0)[None, :]
        if route_weight_ptr is not None:
            weighted = tl.load(route_weight_ptr + route, mask=live, other=0.0)[:, None]
            total *= weighted
            second *= weighted
        if GATED:
            total = activated(total, second, alpha, limit, ACT)
        tl.store(out_ptrs, total.to(tl.bfloat16), mask=wanted)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    weight: tl.tensor,
    row: tl.tensor,
    k: tl.tensor,
    column: tl.tensor,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """[BN, BK] of the weight from ``row`` on; zeros beyond K."""
    if TMA:
        return weight.load([row, k])
    else:
        depth = k + tl.arange(0, BK)
        pointers = weight + (row + tl.arange(0, BN)).to(tl.int64)[:, None] * K + depth[None, :]
        return tl.load(pointers, mask=(column < COLUMNS)[:, None] & (depth < K)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def activated(gate: tl.tensor, up: tl.tensor, alpha: tl.tensor, limit: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    if ACT == "silu":
        root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))
        return gate * root * root * up
    elif ACT == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        root = tl.rsqrt(1.0 + tl.exp2(gate * (alpha * -1.4426950408889634)))
        return gate * root * root * (up + 1.0)
