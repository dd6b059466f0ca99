"""Times on a GPU that is shared: the least of several rounds, more rounds where others disturb, and a word of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import cycle

import pytest
import torch

from mixquant_sglang.kernels.tuning import timing


class Clock:
    """A GPU in which each call takes what it says, and nothing else takes any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[int] = []
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing.time, "monotonic", lambda: clock.now)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(1, dtype=dtype))

    def call(self, index: int, *seconds: float) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            self.now += seconds[min(self.order.count(index), len(seconds) - 1)]
            self.order.append(index)
            return torch.zeros(1)

        return run


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_said", False)


@pytest.mark.parametrize(("each", "rounds"), [(0.001, 20), (0.11, 5), (0.3, 3), (0.6, 3), (5.0, 2)])
def test_repetitions_alternate_and_end_in_time(monkeypatch: pytest.MonkeyPatch, each: float, rounds: int) -> None:
    clock = Clock(monkeypatch)
    with timing.watch() as watched:
        ms = timing.milliseconds([clock.call(0, 1.04 * each, each), clock.call(1, each)], 1.0)
    assert [clock.order.count(i) for i in (0, 1)] == [rounds] * 2
    assert clock.order[:4] == [0, 1, 1, 0]
    assert ms == pytest.approx([1e3 * each, 1e3 * each]) and not watched.disturbed


def test_a_neighbour_for_a_while_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Low precision is the faster one, and looks slower for as long as another server starts: medians had that."""
    clock = Clock(monkeypatch)
    low, bf16 = [0.005] * 18 + [0.001] * 99, [0.003] * 18 + [0.002] * 99
    with timing.watch() as watched:
        assert timing.milliseconds([clock.call(0, *low), clock.call(1, *bf16)], 1.0) == pytest.approx([1.0, 2.0])
    assert clock.order.count(0) == 21  # three rounds that agree
    assert not watched.disturbed and not caplog.records


def test_a_round_that_a_neighbour_made_too_long_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes all the time there is for one of many shapes, and agrees with no other."""
    clock = Clock(monkeypatch)
    low, bf16 = [0.2, *[0.001] * 99], [0.1, *[0.002] * 99]
    with timing.watch() as watched:
        assert timing.milliseconds([clock.call(0, *low), clock.call(1, *bf16)], 0.1) == pytest.approx([1.0, 2.0])
    assert not watched.disturbed
    with timing.watch() as watched:  # and the second too
        timing.milliseconds([clock.call(2, 0.4, 0.3, 0.001), clock.call(3, 0.1)], 0.1)
    assert watched.disturbed


def test_a_neighbour_that_stays_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    stretched = [0.001 * 1.1**n for n in range(200)][::-1]
    with timing.watch() as watched:
        timing.milliseconds([clock.call(0, *stretched)], 1e9)
        assert clock.order.count(0) == timing.PATIENCE * timing.ROUNDS
        timing.milliseconds([clock.call(1, *stretched)], 1e9)
    assert watched.disturbed
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "in use by others" in said and "up to 1.2x apart" in said


def test_some_of_many_may_stray(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    noisy = [0.0001 * 1.1**n for n in range(200)][::-1]
    calls = [clock.call(0, *noisy), *(clock.call(n, 0.001) for n in range(1, 10))]
    with timing.watch() as watched:
        timing.milliseconds(calls, 1e9)
    assert clock.order.count(0) == timing.ROUNDS and not watched.disturbed


@pytest.mark.parametrize(
    ("times", "asked", "disturbed"),
    [
        ([3.0, 3.1, 3.05, 3.0, 9.0], 5, False),
        ([9.0, 5.0, 7.0, 6.0, 8.0, 3.0, 3.0, 3.1], 8, False),
        ([1.0, 2, 4], 20, True),
    ],
)
def test_the_least_of_some_that_agree(times: list[float], asked: int, disturbed: bool) -> None:
    seen = []
    source = cycle(times) if not disturbed else iter(1.2**n for n in range(99))

    def sample() -> float:
        seen.append(next(source))
        return seen[-1]

    with timing.watch() as watched:
        assert timing.least(sample) == min(seen)
    assert len(seen) == asked and watched.disturbed == disturbed
