"""Whole models of the families that we know, on SGLang's own model runner: fusion and leaving out rows change no bit.

Sums are exact, so that a GEMM of fewer rows rounds as one of many does (``tests/support/run_blocks.py``)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import block_models
from tests.support.processes import module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = 37
PLAIN = "version: 1\nprefill: {precision: nvfp4, fuse: false}\n"
FUSED = "version: 1\nprefill: {precision: nvfp4}\n"
ALL_LOW = "protect: {last_prompt_token: false}\n"
RECIPES = {"plain": PLAIN, "fused": FUSED, "plain, all low": PLAIN + ALL_LOW, "fused, all low": FUSED + ALL_LOW}

# of two layers each; the second, dense, of GLM-4.5 has experts
WHOLE, PRUNED = "", ", the last layer's unread rows left out"
EXPECTED = {
    "mistral": "4 RMSNorm, 2 SiLU" + PRUNED,
    "phi3": "4 RMSNorm, 2 SiLU" + PRUNED,
    "granite": "4 RMSNorm, 2 SiLU" + PRUNED,
    "cohere": "2 SiLU" + WHOLE,
    "olmo2": "2 SiLU" + PRUNED,
    "glm4": "4 RMSNorm, 2 SiLU" + PRUNED,
    "mixtral": "2 RMSNorm" + PRUNED,
    "qwen3_moe": "2 RMSNorm" + PRUNED,
    "glm4_moe": "3 RMSNorm, 2 SiLU" + PRUNED,
    "gemma3": "4 RMSNorm, 2 GELU" + PRUNED,
}
BY_ROWS = {"olmo2", "glm4", "mixtral", "qwen3_moe", "glm4_moe", "gemma3"}


@dataclass(frozen=True)
class Ran:
    family: str
    results: dict[str, dict[str, Any]]

    def __getitem__(self, case: str) -> dict[str, Any]:
        return self.results[case]


@pytest.fixture(scope="module", params=EXPECTED)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp(request.param)
    model = str(block_models.make(folder, request.param))
    cases: dict[str, dict[str, str]] = {"stock": {"model": model}, "bf16": {"model": model, "recipe": "bf16"}}
    for name, text in RECIPES.items():
        file = folder / f"{name.replace(', ', '_').replace(' ', '_')}.yaml"
        file.write_text(text)
        cases[name] = {"model": model, "recipe": str(file)}
    done = subprocess.run(
        module("tests.support.run_blocks", json.dumps([*cases.values()])),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases), done.stderr[-6000:]
    yield Ran(request.param, dict(zip(cases, map(json.loads, lines), strict=True)))


def test_recipe_bf16_equals_stock(ran: Ran) -> None:
    assert ran["bf16"]["tokens"] == ran["stock"]["tokens"]
    assert not any("fused in prefill" in line for line in ran["bf16"]["log"])


def test_what_is_fused_is_said(ran: Ran) -> None:
    for case in ("fused", "fused, all low"):
        said = [line for line in ran[case]["log"] if "fused in prefill" in line]
        assert said == [f"mixquant: fused in prefill: {EXPECTED[ran.family]}"]
    assert not any("fused in prefill" in line for line in ran["plain"]["log"])


def test_fused_equals_unfused_to_the_bit(ran: Ran) -> None:
    """Each token and its log probability; and low precision is not stock's."""
    for case in ("", ", all low"):
        assert ran["fused" + case]["tokens"] == ran["plain" + case]["tokens"]
        assert ran["fused" + case]["tokens"] != ran["stock"]["tokens"]
        counted = ("tokens", "protected_rows", "passes")
        after, expected = ran["fused" + case]["after"], ran["plain" + case]["after"]
        assert [after[name] for name in counted] == [expected[name] for name in counted]
        assert after["layers"] == expected["layers"]
    assert ran["fused"]["after"]["tokens"]["prefill"] == {"bf16": 1, "nvfp4": PROMPT - 1}
    assert ran["fused, all low"]["after"]["tokens"]["prefill"] == {"nvfp4": PROMPT}
    assert ran["fused"]["tokens"] != ran["fused, all low"]["tokens"]


def test_the_last_layer_runs_the_row_that_is_sampled_from(ran: Ran) -> None:
    """Two passes of the probe, which ends in the middle of a prompt or samples one row; then the prompt."""
    for case in ("fused", "fused, all low"):
        rows = ran[case]["rows"]
        assert bool(rows) == (ran.family in BY_ROWS)
        assert not rows or (rows[-1] == 1 and max(rows) <= 2)
    assert ran["plain"]["rows"] == []
