"""Prefill attention in FP8 in whole models: what it changes and what it does not, on the CPU, where it is emulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.model_runs import CPU, run

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "tests" / "models" / "tiny-qwen3")
PROMPTS = [200, 30, 70]
RECIPE = "version: 1\nprefill: {{precision: fp8, attention: fp8, attention_from: {}}}\nkernel: {}\n"
LIMIT = 300.0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("low_attention")

    def recipe(tokens: int, kernel: str = "auto") -> str:
        file = folder / f"from-{tokens}-{kernel}.yaml"
        file.write_text(RECIPE.format(tokens, kernel))
        return str(file)

    cases: dict[str, dict[str, Any]] = {
        "bf16 attention": {"recipe": "fp8", "policy": True},
        "low": {"recipe": recipe(64), "policy": True},
        "too short": {"recipe": recipe(500)},
        "not native": {"recipe": recipe(64, "native"), "survive": True},
    }
    found = run([{"model": MODEL, "prompts": PROMPTS, **case} for case in cases.values()], folder, CPU, LIMIT)
    return dict(zip(cases, found, strict=True))


def test_long_prompts_alone_are_low(results: dict[str, Any]) -> None:
    low, plain = results["low"], results["bf16 attention"]
    state = low["after"]["attention"]
    assert state["kernel"] == "emulated" and state["layers"] == {"fp8": 8, "bf16": 0} and state["stays_bf16"] == {}
    assert state["rows"] == {"fp8": 199 + 69, "bf16": 32} and state["passes"] == 1
    assert low["state"]["attention"]["rows"] == {"fp8": 0, "bf16": 0}  # what was run at start is not counted
    assert low["state"]["roles"]["prompt"]["attention"] == "fp8"
    assert low["state"]["roles"]["protected"]["attention"] == low["state"]["roles"]["decode"]["attention"] == "bf16"
    assert any("attention of 8 layers runs in fp8 (emulated" in line for line in low["log"])
    assert low["bits"][0] != plain["bits"][0] and low["after"]["tokens"] == plain["after"]["tokens"]
    first = [found["tokens"][0] for found in (low, plain)]
    assert first[0][0] == first[1][0] and abs(first[0][1] - first[1][1]) < 0.5


def test_decode_rows_and_bf16_requests_have_their_bits(results: dict[str, Any]) -> None:
    """Requests that ask for BF16 prefill, and their decode steps, know nothing of it."""
    assert results["low"]["policy"]["bits"] == results["bf16 attention"]["policy"]["bits"]


def test_passes_of_short_requests_have_their_bits(results: dict[str, Any]) -> None:
    assert results["too short"]["bits"] == results["bf16 attention"]["bits"]
    assert results["too short"]["after"]["attention"]["rows"] == {"fp8": 0, "bf16": 300}
    assert "attention" not in results["bf16 attention"]["after"]


def test_kernel_native_starts_nothing_here(results: dict[str, Any]) -> None:
    """FP8 linears are not native on a CPU, and so nothing starts."""
    assert "native fp8" in results["not native"]["refused"]
