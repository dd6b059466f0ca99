"""Prefill attention in FP8 with FlashAttention 3 in a whole model: what it changes and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.model_runs import run

MODEL = str(Path(__file__).resolve().parents[2] / "tests" / "models" / "tiny-qwen3")
PROMPTS = [9000, 300, 1500]
ARGS = {"attention_backend": "fa3", "max_total_tokens": 40000, "sampling_backend": "pytorch"}
CASES: dict[str, dict[str, Any]] = {
    "bf16 attention": {"recipe": "fp8", "policy": True},
    "low": {"recipe": "fp8-attention", "policy": True},
    "low, pages": {"recipe": "fp8-attention", "args": {**ARGS, "page_size": 64}},
    "another back end": {"recipe": "fp8-attention", "args": {**ARGS, "attention_backend": "triton"}},
}
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = [{"model": MODEL, "prompts": PROMPTS, "args": ARGS, **case} for case in CASES.values()]
    found = dict(zip(CASES, run(cases, tmp_path_factory.mktemp("low"), {}, 300.0), strict=True))
    for name, result in found.items():
        print(name, result.get("error"), [line for line in result["log"] if "attention" in line], result.get("tokens"))
    return found


@pytest.mark.parametrize("name", ["low", "low, pages"])
def test_the_long_prompt_alone_is_low(results: dict[str, Any], name: str) -> None:
    low, plain = results[name], results["bf16 attention"]
    state = low["after"]["attention"]
    assert state["kernel"] == "native" and state["layers"] == {"fp8": 8, "bf16": 0}, state
    assert state["rows"] == {"fp8": 8999, "bf16": 1801} and state["passes"] == 1
    assert low["bits"][0] != plain["bits"][0]
    assert abs(low["tokens"][0][1] - plain["tokens"][0][1]) < 0.5


def test_decode_rows_and_bf16_requests_have_their_bits(results: dict[str, Any]) -> None:
    assert results["low"]["policy"]["bits"] == results["bf16 attention"]["policy"]["bits"]


def test_another_back_end_stays_bf16(results: dict[str, Any]) -> None:
    state = results["another back end"]["after"]["attention"]
    assert state["layers"] == {"fp8": 0, "bf16": 8} and state["rows"] == {"fp8": 0, "bf16": 10800}
    assert any("the attention back end is triton" in line for line in results["another back end"]["log"])
