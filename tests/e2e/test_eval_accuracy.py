"""scripts/eval_accuracy on real servers with the trained model: few examples, so only what no luck can change."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import command_of
from tests.support.server import ON_GPU

pytestmark = [pytest.mark.once, pytest.mark.server, pytest.mark.timeout(1200)]
CPU = ["--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph", "--sleep-on-idle"]
SMALL = "--arms everywhere mix --tasks find text --lengths 400 --n 4 --samples 2 --answer-tokens 48 --kv-tokens 20000"


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("eval")
    command = [
        *command_of("eval_accuracy"),
        "--model",
        tiny_model,
        "--out",
        out,
        *SMALL.split(),
        *([] if ON_GPU else ["--", *CPU]),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = []
    for _ in range(2):  # the second only reads what the first has measured
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        lines.append(done.stdout)
    assert lines[0] == lines[1]
    return out, json.loads((out / "results.json").read_text()), lines[0]


def test_every_arm_ran_what_it_is_called(run: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = run
    precisions = {arm: tuple(server["precision"].values()) for arm, server in results["servers"].items()}
    assert precisions == {"bf16": ("bf16", "bf16"), "everywhere": ("nvfp4", "nvfp4"), "mix": ("nvfp4", "bf16")}


def test_bf16_is_at_no_distance_from_itself_and_the_mix_is_nearer_than_everywhere(
    run: tuple[Path, dict[str, Any], str],
) -> None:
    out, results, _ = run
    kl, first = (results["results"]["text"][measure]["value"] for measure in ("kl", "first"))
    assert kl["bf16"][0] == first["bf16"][0] == 0 < kl["mix"][0] < kl["everywhere"][0]
    assert first["mix"][0] > 0
    assert results["results"]["all"]["identical"]["value"]["bf16"][0] == 1
    for arm in ("bf16", "everywhere", "mix"):
        cell = json.loads((out / "cells" / f"text-0-400-{arm}.json").read_text())
        assert len(cell["kl"]) == 4 and all(0.2 < value < 6 for value in cell["nll"])  # it has learnt the text


def test_it_finds_what_it_was_asked_for(run: tuple[Path, dict[str, Any], str]) -> None:
    _, results, text = run
    assert results["results"]["find"]["accuracy"]["value"]["bf16"][0] >= 0.5
    assert results["results"]["find"]["sampled"]["value"]["bf16"][0] >= 0.5
    assert "recovered share" in text and "emulated: nvfp4" in text
