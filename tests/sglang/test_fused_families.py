"""Whole models of the families that we know, on SGLang's own model runner: fusion and leaving out rows change no bit.

Sums are exact, so that a GEMM of fewer rows rounds as one of many does (``tests/support/run_blocks.py``)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest

from mixquant_sglang.versions import machine
from scripts.models.make_family_models import make
from tests.support import families, model_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PLAIN = "version: 1\nprefill: {precision: nvfp4, fuse: false}\n"
FUSED = "version: 1\nprefill: {precision: nvfp4}\n"
ALL_LOW = "protect: {last_prompt_token: false}\n"
RECIPES = {"plain": PLAIN, "fused": FUSED, "plain, all low": PLAIN + ALL_LOW, "fused, all low": FUSED + ALL_LOW}

WHOLE, PRUNED = "", ", unread rows left out behind the last layer's attention"
LLAMA_LIKE = "4 RMSNorm, 2 SiLU" + PRUNED  # two layers each
GEMMA = "4 RMSNorm, 2 GELU" + PRUNED
EXPECTED = {
    "mistral": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "cohere": "2 SiLU" + WHOLE,
    "olmo2": "2 SiLU" + PRUNED,
    "olmo3": "2 SiLU" + PRUNED,
    "glm4": LLAMA_LIKE,
    "mixtral": "2 RMSNorm" + PRUNED,
    "qwen3_moe": "2 RMSNorm" + PRUNED,
    "qwen2_moe": "2 RMSNorm, 2 SiLU" + PRUNED,
    "glm4_moe": "3 RMSNorm, 2 SiLU" + PRUNED,  # the first layer is dense
    "gemma3_text": GEMMA,
    "gemma3_mm": GEMMA,
    "gemma4": GEMMA,
    "gemma4_moe": GEMMA,
    "qwen3_5": "3 RMSNorm, 2 SiLU" + PRUNED,  # the first layer's attention is linear
    "qwen3_5_moe": "2 SiLU, 1 RMSNorm" + PRUNED,
    "qwen3_next": "2 SiLU, 1 RMSNorm" + PRUNED,
    "qwen3_vl": LLAMA_LIKE,
    "qwen3_vl_moe": "4 RMSNorm" + PRUNED,
}
# One of each shape of block; the others, six models each, run where FAMILIES names them ("all": every one).
USUAL = ("glm4", "gemma3_text", "qwen3_moe", "glm4_moe", "qwen3_next")
LIKE_LLAMA = {"mistral", "phi3", "granite", "qwen3_vl"}  # whose MLP picks no rows itself


@dataclass(frozen=True)
class Ran:
    family: str
    results: dict[str, dict[str, Any]]

    def __getitem__(self, case: str) -> dict[str, Any]:
        return self.results[case]


@pytest.fixture(scope="module", params=EXPECTED)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    name: str = request.param
    asked = os.environ.get("FAMILIES", ",".join(USUAL)).split(",")
    if name not in asked and asked != ["all"]:
        pytest.skip("not one of the usual families: set FAMILIES=all, or name it there")
    expected, folder = families.EXPECTED[name], tmp_path_factory.mktemp(request.param)
    if why := expected.cpu.get(machine.sglang_version()):
        pytest.skip(why)
    steps = 1 if expected.interpreted else 6
    base = {"model": str(make(folder, name)), "prompts": families.PROMPTS, "steps": steps}
    base["args"] = {**expected.args, **expected.cpu_args}
    cases: dict[str, dict[str, Any]] = {"stock": base, "bf16": {**base, "recipe": "bf16"}}
    for title, text in RECIPES.items():
        file = folder / f"{title.replace(', ', '_').replace(' ', '_')}.yaml"
        file.write_text(text)
        cases[title] = {**base, "recipe": str(file)}
    env = model_runs.CPU | ({"TRITON_INTERPRET": "1"} if expected.interpreted else {})
    results = model_runs.run([*cases.values()], folder, env, 300, runner="tests.support.run_blocks")
    assert not [result["error"] for result in results if "error" in result]
    return Ran(name, dict(zip(cases, results, strict=True)))


def test_recipe_bf16_equals_stock(ran: Ran) -> None:
    assert ran["bf16"]["tokens"] == ran["stock"]["tokens"] and ran["bf16"]["bits"] == ran["stock"]["bits"]
    assert not any("fused in prefill" in line for line in ran["bf16"]["log"])


def test_what_is_fused_is_said(ran: Ran) -> None:
    for case in ("fused", "fused, all low"):
        said = [line for line in ran[case]["log"] if "fused in prefill" in line]
        assert said == [f"mixquant: fused in prefill: {EXPECTED[ran.family]}"]
    assert not any("fused in prefill" in line for line in ran["plain"]["log"])


def test_fused_equals_unfused_to_the_bit(ran: Ran) -> None:
    """Tokens and logits; and low precision is not stock's."""
    for case in ("", ", all low"):
        fused, plain = ran["fused" + case], ran["plain" + case]
        assert fused["tokens"] == plain["tokens"] and fused["bits"] == plain["bits"]
        assert fused["bits"] != ran["stock"]["bits"]
        for counted in ("tokens", "protected_rows", "passes", "layers", "experts"):
            assert fused["after"][counted] == plain["after"][counted]
    assert ran["fused"]["bits"] != ran["fused, all low"]["bits"]
    low = sum(families.PROMPTS)
    assert ran["fused, all low"]["after"]["tokens"]["prefill"] == {"nvfp4": low}
    assert ran["fused"]["after"]["tokens"]["prefill"] == {"bf16": 2, "nvfp4": low - 2}


def test_the_last_layer_runs_the_rows_that_are_sampled_from(ran: Ran) -> None:
    """In two passes of the probe and in that of the prompts, of two requests each."""
    for case in ("fused", "fused, all low"):
        rows = ran[case]["rows"]
        assert bool(rows) == (PRUNED in EXPECTED[ran.family] and ran.family not in LIKE_LLAMA)
        assert not rows or (rows[-1] == 2 and max(rows) == 2)
    assert ran["plain"]["rows"] == []
