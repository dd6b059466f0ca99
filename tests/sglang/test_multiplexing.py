"""PD multiplexing: prefill of a few layers at a time between decode steps is the prefill, and the decode, that each is
alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang.versions.dialect import dialect
from tests.support.processes import module


@pytest.fixture(scope="module")
def played(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """About 20 s of one core."""
    if not dialect().multiplexes():
        pytest.skip("this SGLang's own multiplexing does not start: tests/sglang/test_refusals.py")
    done = subprocess.run(
        module("tests.support.run_multiplexed", tiny_model, "auto"),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=tmp_path_factory.mktemp("multiplexing"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_prefill_by_layers_is_that_of_one_pass_and_decode_beside_it_that_of_none(played: dict[str, Any]) -> None:
    assert played["low differs"] and played["prunes"]
    assert [*played["by"]] == ["1", "3", str(played["layers"])]
    for found in played["by"].values():
        assert found["prompt"] and found["decode"]
        assert found["outside"] == ["decode"]


@pytest.mark.slow
def test_a_prompt_is_counted_once_and_each_decode_step(played: dict[str, Any]) -> None:
    assert played["by"]["1"]["steps"] == played["layers"] > played["by"]["3"]["steps"] > 1
    for found in played["by"].values():
        counted = {phase: {p: n for p, n in rows.items() if n} for phase, rows in found["counted"].items()}
        assert counted["prefill"] == {"nvfp4+fp8": 39 + 23, "bf16": 2}
        assert counted["decode"] == {"bf16": found["steps"]}


@pytest.mark.slow
def test_an_update_between_the_layers_of_a_pass(played: dict[str, Any]) -> None:
    """No packed copy is multiplied by while it is not that of its master; what was counted before is said."""
    assert played["held"] == [False, False]  # the first layers were low
    calls, all_of_them = played["from masters"]
    assert calls > 0 and all_of_them
    first, second = played["said"]
    assert first == second and "after 2 layers of a prefill pass of 40 rows" in first
