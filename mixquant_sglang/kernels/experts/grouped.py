"""Experts as two grouped products (``triton/grouped.py``) with quantised activations before each; CUDA only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from mixquant_sglang.kernels.experts.base import Form
from mixquant_sglang.kernels.triton.checks import capability
from mixquant_sglang.kernels.triton.grouped import grouped_matmul
from mixquant_sglang.kernels.tuning.expert_tiles import Tile, Tiles


class Routing(NamedTuple):
    """Routes sorted by expert: ``order`` int32, padded with the number of routes; ``experts`` int32, of each block;
    ``used`` int32 [1], how much of ``order`` is used."""

    order: torch.Tensor
    experts: torch.Tensor
    used: torch.Tensor


class Weight(NamedTuple):
    """FP8 or BF16 codes [E, N, K], contiguous, float32 scales [E, N], and a float32 bias [E, N] or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None


def routing(ids: torch.Tensor, block: int, experts: int) -> Routing:
    """Of ``ids`` int32 [T, k] in blocks of ``block`` routes; never synchronises."""
    import sgl_kernel

    routes = ids.numel()
    most = routes * block if routes < experts + 1 else routes + (experts + 1) * (block - 1)
    most = (most + 3) // 4 * 4  # it is filled by 16 bytes
    order, by_block, used, sums = (
        torch.empty(size, dtype=torch.int32, device=ids.device)
        for size in (most, triton.cdiv(most, block), 1, experts + 2)
    )
    sgl_kernel.moe_align_block_size(ids, experts + 1, block, order, by_block, used, sums, True)
    return Routing(order, by_block, used)


def up(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight: Weight,
    form: Form,
    weights: torch.Tensor,
    sorted_routes: Routing,
    tiles: Tiles,
) -> torch.Tensor:
    """Codes [T, H] and their float32 scales [T, 1], or BF16 values and None -> activated BF16 [T * k, I]."""
    routes = weights.numel()
    out = torch.empty((routes, weight.codes.shape[1] // 2), dtype=torch.bfloat16, device=x.device)
    route_weights = weights if form.weighted_input else None
    _product(x, x_scales, weight, out, route_weights, sorted_routes, weights.shape[1], form, tiles, tiles.up)
    return out


def down(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight: Weight,
    form: Form,
    weights: torch.Tensor,
    sorted_routes: Routing,
    tiles: Tiles,
) -> torch.Tensor:
    """Codes [T * k, I] -> BF16 [T, H], the weighted sum over each token's experts."""
    import sgl_kernel

    (tokens, k), h = weights.shape, weight.codes.shape[1]
    parts = torch.empty((tokens, k, h), dtype=torch.bfloat16, device=x.device)
    route_weights = None if form.weighted_input else weights
    _product(x, x_scales, weight, parts, route_weights, sorted_routes, 1, None, tiles, tiles.down)
    out = torch.empty((tokens, h), dtype=torch.bfloat16, device=x.device)
    sgl_kernel.moe_sum_reduce(parts, out, form.scaling)
    return out


def _product(
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    weight: Weight,
    out: torch.Tensor,
    route_weights: torch.Tensor | None,
    sorted_routes: Routing,
    share: int,
    form: Form | None,
    tiles: Tiles,
    tile: Tile,
) -> None:
    experts, n, k = weight.codes.shape
    columns = n // 2 if form else n
    flat = weight.codes.view(experts * n, k)
    tma = capability(x.device) >= (9, 0)
    operand = flat
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        operand = TensorDescriptor(flat, [*flat.shape], [*flat.stride()], [tile.n, tile.k])
    grid = (sorted_routes.experts.shape[0] * triton.cdiv(columns, tile.n),)
    grouped_matmul[grid](
        x,
        operand,
        out,
        x_scales,
        weight.scales,
        weight.bias,
        route_weights,
        *sorted_routes,
        out.numel() // columns,
        form.alpha if form else 1.0,
        form.limit if form else 0.0,
        N=n,
        K=k,
        SHARE=share,
        ACT=form.activation if form else "",
        TMA=tma,
        BM=tiles.rows,
        BN=tile.n,
        BK=tile.k,
        GROUP=16,
        HALVES=tiles.halves,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
