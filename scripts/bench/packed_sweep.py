"""What ``bench_packed --sweep`` tries, and which of it should serve: lines for ``kernels/triton/packed_tiles.py``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import triton

from mixquant_sglang.kernels.triton import packed_rows, packed_tiles
from mixquant_sglang.kernels.triton.packed_rows import Packed
from mixquant_sglang.kernels.triton.packed_tiles import BUCKETS, WIDE, Choice, Tiles, Warps

Class = tuple[bool, int, bool]  # NVFP4, bucket, wide: as in ``packed_tiles.CHOICES``
Job = tuple[bool, int, int, int, Tiles | Warps]  # NVFP4, n, k, rows, what is launched

_WARPS = (
    *(Warps(n, pieces, warps) for n in (16, 32) for pieces in (1, 2, 4) for warps in (4, 8, 16)),
    *(Warps(64, pieces, 8) for pieces in (1, 2)),
)
_FEW = (
    *(Tiles(16, 256, 1, 6, 4), Tiles(16, 512, 1, 4, 4), Tiles(32, 128, 1, 6, 4), Tiles(32, 256, 1, 4, 4)),
    *(Tiles(32, 256, 1, 4, 2), Tiles(32, 512, 1, 3, 2), Tiles(64, 128, 1, 5, 4), Tiles(64, 256, 1, 4, 4)),
)
_SOME = (
    *(Tiles(32, 128, 1, 5, 4), Tiles(32, 256, 1, 3, 4), Tiles(64, 64, 1, 6, 4), Tiles(64, 128, 1, 4, 4)),
    *(Tiles(64, 256, 1, 3, 4), Tiles(128, 64, 1, 5, 8), Tiles(128, 128, 1, 3, 8)),
    # Wide ones: each tile reads all rows from the L2 cache again, which 64 rows of BF16 make more than the weights.
    *(Tiles(128, 64, 1, 6, 4), Tiles(128, 128, 1, 4, 4), Tiles(256, 64, 1, 4, 8), Tiles(256, 128, 1, 3, 8)),
)
_MANY = (
    *(Tiles(64, 64, 1, 5, 4), Tiles(64, 128, 1, 3, 4), Tiles(128, 64, 1, 4, 4), Tiles(128, 64, 1, 4, 8)),
    *(Tiles(128, 128, 1, 3, 8), Tiles(256, 64, 1, 3, 8), Tiles(256, 64, 1, 4, 8), Tiles(256, 128, 1, 2, 8)),
)
SHARING = ((1, 4), (96, 4), (128, 8), (192, 4), (256, 8), (384, 4))  # ``Choice``: programs, most


def bucket_of(rows: int) -> int:
    return next((bucket for bucket in BUCKETS if bucket >= rows), BUCKETS[-1])


def candidates(bucket: int) -> list[Choice]:
    tiled = _FEW if bucket <= 16 else _SOME if bucket <= 64 else _MANY
    warps = [Choice(tiles) for tiles in _WARPS] if bucket <= 32 else []
    return warps + [Choice(tiles, *sharing) for tiles in tiled for sharing in SHARING]


def launches(bucket: int, n: int, k: int) -> dict[Tiles | Warps, list[Choice]]:
    """What the candidates come to for a weight [n, k]: some to the same."""
    found: dict[Tiles | Warps, list[Choice]] = defaultdict(list)
    for choice in candidates(bucket):
        found[choice.of(n, k)].append(choice)
    return found


class Sweep:
    def __init__(self) -> None:
        self._times: dict[Class, dict[Choice, dict[tuple[int, int, int], float]]] = defaultdict(
            lambda: defaultdict(dict)
        )

    def note(self, fp4: bool, m: int, n: int, k: int, found: dict[Tiles | Warps, float]) -> None:
        """Microseconds of ``m`` rows and a weight [n, k]."""
        for tiles, choices in launches(bucket_of(m), n, k).items():
            for choice in choices:
                if tiles in found:
                    self._times[fp4, bucket_of(m), n >= WIDE][choice][m, n, k] = found[tiles]

    def lines(self, most: int = 3) -> Iterator[str]:
        """For each class the choice that takes least time over all of its cells, and after it those that come next."""
        for (fp4, bucket, wide), times in sorted(self._times.items()):
            cells = {cell for of in times.values() for cell in of}
            total = {choice: sum(of.values()) for choice, of in times.items() if of.keys() == cells}
            if not total:
                yield f"    # {(fp4, bucket, wide)}: nothing ran in all of {len(cells)} cells"
                continue
            best = sorted(total, key=lambda choice: total[choice])[:most]
            now = packed_tiles.CHOICES[fp4, bucket, wide]
            serving = sum(times[now].values()) if times[now].keys() == cells else None
            said = "; ".join(f"{line(choice)} {total[choice]:.1f}" for choice in best)
            said += f"; now {serving:.1f}" if serving is not None else "; what serves now was not tried"
            yield f"    ({fp4}, {bucket}, {wide}): {line(best[0])},  # us: {said}"


def line(choice: Choice) -> str:
    tiles = f"{type(choice.tiles).__name__}({', '.join(map(str, choice.tiles))})"
    return f"Choice({tiles})" if choice.programs == 1 else f"Choice({tiles}, {choice.programs}, {choice.most})"


def compile_ahead(formats: Sequence[str], rows: Sequence[int], shapes: Sequence[tuple[int, int]]) -> int:
    """Compiles what the sweep launches, in processes side by side, into Triton's cache; how many launches these were.

    Call it before this process has a CUDA context, which does not survive a fork."""
    jobs = {
        (fmt == "w4a16", n, k, m, tiles)
        for fmt in formats
        for n, k in shapes
        for m in rows
        for tiles in launches(bucket_of(m), n, k)
    }
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), 16), get_context("fork")) as pool:
        return sum(pool.map(_compile, _dealt(jobs), chunksize=8))


def _dealt(jobs: Iterable[Job]) -> list[Job]:
    return sorted(jobs, key=str)


def _compile(job: Job) -> int:
    fp4, n, k, m, tiles = job
    codes = torch.zeros(n, k // 2 if fp4 else k, dtype=torch.uint8, device="cuda")
    locks = torch.zeros(packed_tiles.LOCKS, dtype=torch.int32, device="cuda")
    if fp4:
        scales = torch.zeros(n, k // 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        weight = Packed(codes, torch.ones((), device="cuda"), locks, scales)
    else:
        weight = Packed(codes.view(torch.float8_e4m3fn), torch.ones(n, device="cuda"), locks)
    try:
        packed_rows.linear_rows(torch.zeros(m, k, dtype=torch.bfloat16, device="cuda"), weight, tiles=tiles)
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources:
        return 0  # the sweep meets it again, and leaves it out
    return 1
