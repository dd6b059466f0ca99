"""Tiles of the linears of BF16 rows and packed weights (``packed_rows.py``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from mixquant_sglang.kernels.limits import BLOCK, MANY_ROWS

BUCKETS = (16, 32, 64, 128)  # rows: what a kernel is compiled for; more take several tiles of the last
PLACED = 64  # of rows that are put in their places, the last
_STEPS = 4  # along K that a program has at least
LOCKS = 4096  # tiles of which a split launch has at most as many


class Tiles(NamedTuple):
    """Weight rows and weights along K of a tile, programs along K, tiles in flight, warps."""

    n: int
    k: int
    split: int
    stages: int
    warps: int


def choose(n: int, k: int, bucket: int, fp4: bool) -> Tiles:
    """The tiles for a weight [n, k] and a bucket of rows: those that were best, or nearly, of the sweep of
    ``scripts/bench_packed`` over Qwen3-8B's weights on an H200 (``docs/benchmarks.md``).

    Few rows are a matter of reading: narrow tiles of two warps, some for each SM.  With more rows wider tiles read
    these less often from the L2 cache.  Programs share tiles along K until there are ``programs``."""
    programs = 384
    if bucket <= 16:
        tiles = Tiles(32, 256, 1, 4, 2)
    elif bucket <= 64:
        tiles = Tiles(64, 128, 1, 4, 4)
        programs = 384 if fp4 or bucket <= 32 else 192
    elif fp4 or n < 96 * 64:
        tiles, programs = Tiles(128, 128, 1, 3, 8), 96
    else:
        tiles, programs = Tiles(64, 128, 1, 3, 4), 1
    over, split = triton.cdiv(n, tiles.n), 1
    while over * split < programs and k // tiles.k >= 2 * split * _STEPS and split < 4:
        split *= 2
    return tiles._replace(split=split)


def fitting(tiles: Tiles, n: int, k: int, m: int, bucket: int, fp4: bool, shared: int) -> Tiles:
    """``tiles`` with no more along K than divides it, in no more programs than there are such tiles, and no more of
    them in flight than ``shared`` bytes of memory take."""
    block_k = tiles.k
    while block_k > BLOCK and k % block_k:
        block_k //= 2
    split = min(tiles.split, k // block_k)
    over = triton.cdiv(n, tiles.n) * triton.cdiv(max(m, MANY_ROWS), bucket)  # one choice for any number of rows
    each = block_k * (2 * bucket + (tiles.n * 9 // 16 if fp4 else tiles.n))
    stages = max(2, min(tiles.stages, shared // each))
    return tiles._replace(k=block_k, split=split if over <= LOCKS else 1, stages=stages)


def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have; without a GPU (Triton's interpreter) any."""
    if device.type != "cuda":
        return 2**20
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])
