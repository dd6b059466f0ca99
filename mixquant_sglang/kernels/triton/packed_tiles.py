"""Tiles of the linears of BF16 rows and packed weights (``packed_rows.py``)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from mixquant_sglang.kernels.limits import BLOCK, MANY_ROWS

BUCKETS = (8, 16, 32, 64, 128)  # rows: what a kernel is compiled for; more take several tiles of the last
LEAST = 16  # rows that ``Tiles`` are made for
_STEPS = 4  # along K that a program has at least
LEAST_K = 16  # that tensor cores take at a time; of NVFP4, of the even and of the odd numbers along K
LOCKS = 4096  # tiles of which a split launch has at most as many
WIDE = 96 * 64  # weight rows from which on tiles are others
# Whether the compiler keeps what ``Warps`` read in registers: from 3.7 on it goes through 64 KB of shared memory.
STRAIGHT = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


class Tiles(NamedTuple):
    """Weight rows and weights along K of a tile, programs along K, tiles in flight, warps."""

    n: int
    k: int
    split: int
    stages: int
    warps: int


class Warps(NamedTuple):
    """Of ``packed_warps.py``: weight rows of a program; pieces of 64 bytes of a weight row that a warp reads at once;
    warps, which share K."""

    n: int
    pieces: int
    warps: int


class Choice(NamedTuple):
    """``programs``: of ``Tiles``, along K as many share a tile as it takes to have so many, ``most`` at most."""

    tiles: Tiles | Warps
    programs: int = 1
    most: int = 4

    def of(self, n: int, k: int) -> Tiles | Warps:
        tiles = self.tiles
        if isinstance(tiles, Warps):
            return tiles
        over, split = triton.cdiv(n, tiles.n), 1
        while over * split < self.programs and k // tiles.k >= 2 * split * _STEPS and split < self.most:
            split *= 2
        return tiles._replace(split=split)


# (NVFP4, bucket, wide) -> what serves: what ``scripts/bench_packed --sweep`` found for Qwen3-8B's weights on an H200
# (Triton 3.6, November 2026); 16 and 128 rows of NVFP4 are older.
_ANY_K = Warps(16, 2, 8)
_FEW = Choice(Tiles(32, 256, 1, 4, 2), 384)
_SOME = Choice(Tiles(64, 128, 1, 4, 4), 384)
_MANY = Choice(Tiles(128, 128, 1, 3, 8), 96)
CHOICES: dict[tuple[bool, int, bool], Choice] = {
    (False, 8, False): Choice(Warps(16, 2, 8)),
    (False, 8, True): Choice(Warps(16, 2, 8)),
    (False, 16, False): _FEW,
    (False, 16, True): _FEW,
    (False, 32, False): Choice(Tiles(32, 256, 1, 3, 4), 384),
    (False, 32, True): _SOME,
    (False, 64, False): _SOME._replace(programs=192),
    (False, 64, True): _SOME._replace(programs=1),
    (False, 128, False): Choice(Tiles(64, 128, 1, 3, 4), 192),
    (False, 128, True): Choice(Tiles(64, 128, 1, 3, 4)),
    (True, 8, False): Choice(Warps(16, 2, 8)),
    (True, 8, True): Choice(Warps(16, 1, 4)),
    (True, 16, False): _FEW,
    (True, 16, True): _FEW,
    (True, 32, False): Choice(Tiles(128, 128, 1, 3, 8), 256, 8),
    (True, 32, True): Choice(Tiles(128, 128, 1, 3, 8), 256, 8),
    (True, 64, False): Choice(Tiles(64, 256, 1, 3, 4), 192),
    (True, 64, True): _SOME,
    (True, 128, False): _MANY,
    (True, 128, True): _MANY,
}


@functools.cache
def choose(n: int, k: int, bucket: int, fp4: bool) -> Tiles | Warps:
    """The tiles for a weight [n, k] and a bucket of rows.

    Few rows are a matter of reading.  With more rows wider tiles read these less often from the L2 cache.  Programs
    share tiles along K until there are enough to fill the GPU."""
    choice = CHOICES[fp4, bucket, n >= WIDE]
    if isinstance(choice.tiles, Warps) and not STRAIGHT:
        choice = _FEW
    return choice.of(n, k)


@functools.cache
def fitting(tiles: Tiles | Warps, n: int, k: int, m: int, bucket: int, fp4: bool, shared: int) -> Tiles | Warps:
    """``tiles`` with no more along K than divides it, in no more programs than there are such tiles, and no more of
    them in flight than ``shared`` bytes of memory take; no warps that would find no weights.

    No tile along K divides NVFP4's K where it is no multiple of 32: then warps, which cut theirs short, for any number
    of rows."""
    if fp4 and k % (2 * LEAST_K) and not isinstance(tiles, Warps):
        tiles = _ANY_K
    if isinstance(tiles, Warps):
        return _fitting_warps(tiles, k // 2 if fp4 else k)
    bucket = max(bucket, LEAST)
    block_k = tiles.k
    while block_k > BLOCK and k % block_k:
        block_k //= 2
    split = min(tiles.split, k // block_k)
    over = triton.cdiv(n, tiles.n) * triton.cdiv(max(m, MANY_ROWS), bucket)  # one choice for any number of rows
    each = block_k * (2 * bucket + (tiles.n * 9 // 16 if fp4 else tiles.n))
    stages = max(2, min(tiles.stages, shared // each))
    return tiles._replace(k=block_k, split=split if over <= LOCKS else 1, stages=stages)


def _fitting_warps(tiles: Warps, width: int) -> Warps:
    _, pieces, warps = tiles
    while pieces > 1 and 64 * pieces * warps > width:
        pieces //= 2
    while warps > 1 and 64 * pieces * warps >= 2 * width:
        warps //= 2
    return tiles._replace(pieces=pieces, warps=warps)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have; without a GPU (Triton's interpreter) any.

    Asked once: Triton reads the clocks with the other properties, and a driver is slow to say these."""
    if device.type != "cuda":
        return 2**20
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])
