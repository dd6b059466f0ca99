"""Which kernel and tiles serve linears over packed weights, and what a sweep says about it."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from mixquant_sglang.kernels.limits import MANY_ROWS, PLACED
from mixquant_sglang.kernels.triton import packed_tiles
from mixquant_sglang.kernels.triton.packed_tiles import (
    BUCKETS,
    CHOICES,
    WIDE,
    Choice,
    Tiles,
    Warps,
    choose,
    fitting,
)
from scripts.bench import packed_sweep

SIZES = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (40, 48), (96, 16), (1000, 1040)]


def test_every_kind_of_launch_has_a_choice() -> None:
    assert CHOICES.keys() == set(itertools.product((False, True), BUCKETS, (False, True)))


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_few_rows_are_for_warps(n: int, k: int, fp4: bool, straight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiler leaves what they read in registers."""
    monkeypatch.setattr(packed_tiles, "STRAIGHT", straight)
    for bucket in BUCKETS:
        chosen = choose.__wrapped__(n, k, bucket, fp4)
        assert isinstance(chosen, Warps) == (straight and bucket <= 8)
        slots = range(1, (MANY_ROWS if bucket == PLACED else bucket) + 1)
        fitted = [fitting(chosen, n, k, m, bucket, fp4, 232448) for m in slots]
        assert len({*fitted}) == 1  # a row's bits do not depend on how many of a bucket, or slots, there are
        if isinstance(fitted[0], Warps):
            _, pieces, warps = fitted[0]
            assert warps == 1 or 64 * pieces * warps < 2 * (k // 2 if fp4 else k)  # none is without weights


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize("fp4", [False, True])
@pytest.mark.parametrize(("n", "k"), [*SIZES, (4096, 528), (4096, 32)])
def test_tensor_cores_take_what_a_tile_has_along_k(
    n: int, k: int, fp4: bool, straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least 16 numbers, and NVFP4's even and odd ones are multiplied apart: else nothing compiles on a GPU."""
    monkeypatch.setattr(packed_tiles, "STRAIGHT", straight)
    for bucket in BUCKETS:
        for m in (bucket, 256):
            fitted = fitting.__wrapped__(choose.__wrapped__(n, k, bucket, fp4), n, k, m, bucket, fp4, 232448)
            if isinstance(fitted, Tiles):
                assert k % fitted.k == 0 and fitted.k // (2 if fp4 else 1) >= 16
            else:
                assert fitted.warps >= 1 and fitted.pieces >= 1


def test_programs_share_tiles_until_there_are_enough() -> None:
    choice = Choice(Tiles(64, 128, 1, 4, 4), 384)
    assert choice.of(24576, 4096) == choice.tiles
    assert choice.of(6144, 4096) == Tiles(64, 128, 4, 4, 4)
    assert choice.of(6144, 512) == Tiles(64, 128, 1, 4, 4)  # too few steps for two
    assert Choice(Warps(16, 2, 8), 384).of(64, 64) == Warps(16, 2, 8)


def test_a_sweep_tries_what_serves_and_prints_lines_of_the_table() -> None:
    sweep = packed_sweep.Sweep()
    wanted = {}
    for fp4, bucket, (n, k) in itertools.product((False, True), BUCKETS, SIZES[:4]):
        launches = packed_sweep.launches(bucket, n, k)
        assert choose(n, k, bucket, fp4) in launches
        tried = {tiles: 100.0 + place for place, tiles in enumerate(launches)}
        best = packed_sweep.candidates(bucket)[7 % len(packed_sweep.candidates(bucket))]
        tried[best.of(n, k)] = 1.0
        lost = packed_sweep.candidates(bucket)[0]
        if n == 4096 and k == 4096:
            del tried[lost.of(n, k)]  # did not fit: not for this class then
        sweep.note(fp4, bucket, n, k, tried)
        wanted[fp4, bucket, n >= WIDE] = best, lost
    lines = [*sweep.lines()]
    table = eval("{" + "\n".join(lines) + "\n}", vars(packed_tiles).copy())
    assert table.keys() == CHOICES.keys()
    for key, (best, lost) in wanted.items():
        assert all(table[key].of(n, k) == best.of(n, k) for n, k in SIZES[:4] if (n >= WIDE) == key[2])
        (said,) = (line for line in lines if line.startswith(f"    {key}:"))
        assert "; now " in said and (key[2] or packed_sweep.line(lost) not in said.split("us: ")[1].split(";")[0])
