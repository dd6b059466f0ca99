"""``min_tokens: auto`` without a GPU: times are made up, the choice and the file are what a server has."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.tuning import break_even
from mixquant_sglang.kernels.tuning.break_even import Alike, Totals, add_up, describe, file_of, least_rows, load_or_time
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell
from mixquant_sglang.recipe.parse import with_min_tokens

CPU = torch.device("cpu")
VERSIONS = {"sgl_kernel": "0.4.5"}
ROWS = (16, 256, 384, 512, 1024)


def totals(*low: float, bf16: Sequence[float] = (5.0, 8.0, 10.0, 13.0, 23.0)) -> Totals:
    return dict(zip(ROWS, zip(bf16, low, strict=True), strict=True))


@pytest.mark.parametrize(
    ("low", "least"),
    [
        ((7.0, 9.0, 10.5, 12.0, 18.0), 385),  # so that a graph of 384 rows is BF16 and one of 512 is not
        ((4.0, 7.0, 9.0, 12.0, 18.0), 1),
        ((7.0, 9.0, 9.9, 12.0, 18.0), 385),  # 1 % is not a gain
        ((4.0, 7.0, 9.0, 13.1, 18.0), 513),  # a loss beyond a gain
        ((4.0, 7.0, 9.0, 12.9, 18.0), 1),  # a tie beyond a gain is no loss
        ((7.0, 9.0, 11.0, 14.0, 24.0), 1025),
    ],
)
def test_the_choice(low: tuple[float, ...], least: int) -> None:
    assert least_rows(totals(*low)) == least


def test_what_is_said_of_it() -> None:
    some = totals(7.0, 9.0, 10.5, 12.0, 18.0)
    assert describe(some, 385) == (
        "passes of fewer than 385 new tokens stay BF16, which is faster (linears and experts: 384 rows 10.00 ms in "
        "BF16 and 10.50 low, 512 rows 13.00 ms in BF16 and 12.00 low)"
    )
    none = totals(7.0, 9.0, 11.0, 14.0, 24.0)
    assert describe(none, 1025).endswith("and 24.00 low; low precision is not faster at any size up to 1024)")


def test_layers_add_up() -> None:
    assert add_up([{32: (1.0, 2.0), 16: (0.5, 1.0)}, {}, {32: (10.0, 20.0)}]) == {16: (0.5, 1.0), 32: (11.0, 22.0)}
    assert least_rows({}) == 1  # of a stage without low layers, whose ranks hear of the others' sums


def alike(n: int, count: int, each: int = 1) -> Alike:
    def calls(rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
        raise AssertionError("not on a CPU")

    return Alike(f"{count} linears [{n}, 64]", (n, 64, n, 2), count, each, calls)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """What is timed: (N, rows); BF16 takes N ms and low precision as many microseconds for each row."""
    seen: list[tuple[int, int]] = []

    def times(one: Alike, rows: Sequence[int]) -> dict[int, Cell]:
        seen.extend((one.sizes[0], m) for m in rows)
        return {m: Cell({"bf16": float(one.sizes[0]), "low": one.sizes[0] * m / 1000}, {}) for m in rows}

    monkeypatch.setattr(break_even, "_times", times)
    monkeypatch.setenv("MIXQUANT_CACHE_DIR", str(tmp_path / "cache"))
    return seen


FILE = file_of("linear", "fp8", ("n", "k", "cut"))


def test_the_file_is_read_at_the_next_start(timed: list[tuple[int, int]], tmp_path: Path) -> None:
    layers, rows = [alike(48, 3), alike(96, 1)], (16, 96, 384)
    first = load_or_time(FILE, layers, rows, CPU, VERSIONS)
    assert first is not None and [*first] == [16, 96, 384]
    assert [time for pair in first.values() for time in pair] == pytest.approx([240, 3.84, 240, 23.04, 240, 92.16])
    assert sorted(timed) == [(48, 16), (48, 96), (48, 384), (96, 16), (96, 96), (96, 384)]
    timed.clear()
    assert load_or_time(FILE, layers, rows, CPU, VERSIONS) == first and timed == []
    assert load_or_time(FILE, [alike(48, 9)], (96,), CPU, VERSIONS) == {96: (432.0, pytest.approx(41.472))}
    assert timed == []
    load_or_time(FILE, [*layers, alike(64, 1)], (16, 32), CPU, VERSIONS)
    assert sorted(timed) == [(48, 32), (64, 16), (64, 32), (96, 32)]
    (file,) = (tmp_path / "cache").iterdir()
    entries = json.loads(file.read_text())["entries"]
    assert {
        "n": 48,
        "k": 64,
        "cut": 48,
        "form": 2,
        "rows": 96,
        "ms": {"bf16": 48.0, "low": 4.608},
        "out": {},
    } in entries
    timed.clear()
    load_or_time(file_of("linear", "nvfp4", ("n", "k", "cut")), layers, (16,), CPU, VERSIONS)
    load_or_time(FILE, layers, (16,), CPU, {"sgl_kernel": "0.4.6"})
    assert len(timed) == 4


def test_too_little_memory(
    timed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def times(one: Alike, rows: Sequence[int]) -> dict[int, Cell]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(break_even, "_times", times)
    assert load_or_time(FILE, [alike(48, 3)], (16, 96), CPU, VERSIONS) is None
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said == "mixquant: too little memory to time passes of up to 96 rows"


def test_the_environment_goes_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recipe.RECIPE_ENV, "fp8")
    for text, wanted in (("", None), ("auto", None), ("1", 1), ("480", 480)):
        monkeypatch.setenv(recipe.MIN_TOKENS_ENV, text)
        assert recipe.load_requested().min_tokens == wanted
    asked = with_min_tokens(recipe.load("fp8"), "7")
    assert with_min_tokens(asked, "").min_tokens == 7 and with_min_tokens(asked, "auto").min_tokens is None
    for wrong in ("0", "-1", "1.5", "1e3", " 7", "many", "012"):
        with pytest.raises(MixQuantError, match=r"MIXQUANT_MIN_TOKENS.*allowed: an integer of at least 1 or auto"):
            with_min_tokens(asked, wrong)
