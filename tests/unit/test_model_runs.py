"""How the cases of ``tests.support.model_runs`` are shared out to processes, with a stand-in for the models."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import model_runs
from tests.support.run_model import BROKEN

RUNNER = "tests.support.run_nothing"
Result = dict[str, Any]


def cases(*kinds: str) -> list[Result]:
    return [{"kind": kind, "number": number, "broken": BROKEN} for number, kind in enumerate(kinds)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_results_come_in_order_and_by_number(tmp_path: Path, at_once: int) -> None:
    told: dict[int, Result] = {}
    asked = cases("runs", "ends", "runs", "runs", "breaks", "runs")
    results = model_runs.run(asked, tmp_path, {}, 60, RUNNER, told.__setitem__, at_once)
    assert [told[number] for number in range(len(asked))] == results
    assert [result.get("number", -1) for result in results] == [0, -1, 2, 3, 4, 5]
    assert "the process ended: said at the end" in results[1]["error"] and results[4]["broken"]


def test_no_case_has_no_result(tmp_path: Path) -> None:
    assert model_runs.run([], tmp_path, {}, 60, RUNNER) == []


def test_what_fails_in_one_share_ends_the_others(tmp_path: Path) -> None:
    def said(number: int, result: Result) -> None:
        raise KeyError(number)

    began = time.monotonic()
    with pytest.raises(KeyError):
        model_runs.run(cases("runs", "runs", "hangs", "hangs"), tmp_path, {}, 60, RUNNER, said, at_once=2)
    assert time.monotonic() - began < 30


def test_a_case_that_hangs_has_its_limit(tmp_path: Path) -> None:
    results = model_runs.run(cases("hangs", "runs"), tmp_path, {}, 5, RUNNER)
    assert "the process ended" in results[0]["error"] and results[1]["number"] == 1
