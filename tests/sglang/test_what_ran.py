"""Whole models on SGLang's own model runner: what the report, the counters and the labels say is what ran.

One process runs them all, as a scheduler would (``tests/support/run_model.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang.recipe.modules import TIED
from tests.support import tiny_models
from tests.support.processes import module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ALL = 1 << 30
PROMPT = 37
NOT_FUSED = "version: 1\nprefill: {precision: nvfp4, fuse: false}\n"
BY_RULE = """version: 1
prefill: {precision: bf16, fuse: false}
layers:
  - {match: 're:.*\\.(gate_up|down)_proj', prefill: nvfp4}
"""
EXPERTS_BY_RULE = """version: 1
prefill: {precision: nvfp4}
layers:
  - {match: 're:.*\\.experts', prefill: bf16}
  - {match: 're:.*\\.(qkv|o)_proj', prefill: fp8}
"""
W4A4 = NOT_FUSED + "decode: {precision: nvfp4}\n"

Result = dict[str, Any]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("families")
    mixtral, vision, stablelm = (str(tiny_models.make(folder, n)) for n in ("mixtral", "qwen2_5_vl", "stablelm"))
    files = {name: folder / f"{name}.yaml" for name in ("not_fused", "by_rule", "w4a4", "experts")}
    for file, text in zip(files.values(), (NOT_FUSED, BY_RULE, W4A4, EXPERTS_BY_RULE), strict=True):
        file.write_text(text)
    qwen = str(tiny_model)
    cases = {
        "stock mixtral": {"model": mixtral},
        "bf16 mixtral": {"model": mixtral, "recipe": "bf16"},
        "mixtral": {"model": mixtral, "recipe": "auto"},
        "experts by rule": {"model": mixtral, "recipe": str(files["experts"])},
        "vision": {"model": vision, "recipe": "auto"},
        "stablelm": {"model": stablelm, "recipe": "auto"},
        "past": {"model": qwen, "recipe": str(files["not_fused"]), "past": ALL},
        "past a rule": {"model": qwen, "recipe": str(files["by_rule"]), "past": ALL},
        "past in short passes": {"model": qwen, "recipe": str(files["by_rule"]), "past": 16},
        "past in decode": {"model": qwen, "recipe": str(files["w4a4"]), "past": 2},
    }
    done = subprocess.run(
        module("tests.support.run_model", json.dumps([*cases.values()])),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cases), done.stderr[-6000:]
    return dict(zip(cases, map(json.loads, lines), strict=True))


def test_mixtral_is_sglangs_own_class_and_recipe_bf16_equals_stock(ran: dict[str, Result]) -> None:
    stock, control = ran["stock mixtral"], ran["bf16 mixtral"]
    assert stock["class"] == control["class"] == ran["mixtral"]["class"] == "MixtralForCausalLM"
    assert control["tokens"] == stock["tokens"]
    assert control["state"]["layers"] == {"bf16": 7} and control["state"]["experts"] == {"bf16": 2}


def test_experts_are_low_like_linears_and_gates_are_not(ran: dict[str, Result]) -> None:
    state = ran["mixtral"]["state"]
    assert state["layers"] == {"fp8": 4, "bf16": 3} and state["experts"] == {"nvfp4": 2}
    gates = "model.layers.0.block_sparse_moe.gate, model.layers.1.block_sparse_moe.gate, lm_head"
    assert state["stays_bf16"] == {"never quantised": gates}
    assert state["roles"]["prompt"] == {"linear": "fp8", "experts": "nvfp4", "attention": "bf16"}
    assert {*state["roles"]["decode"].values()} == {*state["roles"]["protected"].values()} == {"bf16"}
    assert state["precision"] == {"prefill": "nvfp4+fp8", "decode": "bf16"}
    low = {"bf16": 1, "nvfp4+fp8": PROMPT - 1}
    assert ran["mixtral"]["after"]["tokens"] == {"prefill": low, "decode": {"bf16": 6}}
    assert ran["mixtral"]["tokens"] != ran["stock mixtral"]["tokens"]
    ran_all = "mixquant: a tiny prompt ran 6 of 6 low linears and MoE layers (passes: 12 rows, 40 rows, decode)"
    assert ran_all in ran["mixtral"]["log"]


def test_experts_kept_bf16_by_rule(ran: dict[str, Result]) -> None:
    """The label is then what is left: FP8 in attention, under a recipe that is NVFP4 on a CPU."""
    state = ran["experts by rule"]["state"]
    assert state["layers"] == {"fp8": 4, "bf16": 3} and state["experts"] == {"bf16": 2}
    experts = "model.layers.0.block_sparse_moe.experts, model.layers.1.block_sparse_moe.experts"
    assert state["stays_bf16"]["by rule of the recipe"] == experts
    assert state["precision"] == {"prefill": "fp8", "decode": "bf16"}


def test_the_probe_leaves_nothing_behind(ran: dict[str, Result]) -> None:
    nothing = {"tokens": {"prefill": {}, "decode": {}}, "protected_rows": 0, "passes": {"prefill": 0, "decode": 0}}
    for name, result in ran.items():
        if result.get("state") is not None:
            assert nothing.items() <= result["state"].items(), name
        assert "refused" in result or result["free"] == ran["stock mixtral"]["free"], name
    assert not any("tiny prompt" in line for line in ran["bf16 mixtral"]["log"])  # nothing low, nothing to prove


def test_a_vision_tower_stays_bf16(ran: dict[str, Result]) -> None:
    state = ran["vision"]["state"]
    assert state["layers"] == {"fp8": 6, "nvfp4": 2, "bf16": 11}
    outside = state["stays_bf16"]["never quantised: outside the language model"]
    assert outside.startswith("visual.blocks.0.attn.qkv_proj, ") and outside.endswith(" and 6 more")
    assert state["precision"]["prefill"] == "nvfp4+fp8"
    assert "mixquant: a tiny prompt ran 8 of 8 low linears (passes: 12 rows, 40 rows, decode)" in ran["vision"]["log"]


def test_linears_that_sglang_does_not_offer_are_not_the_recipes_doing(ran: dict[str, Result]) -> None:
    state = ran["stablelm"]["state"]
    assert state["layers"] == {"nvfp4": 2, "fp8": 2, "bf16": 5}
    assert state["stays_bf16"]["SGLang gives it no quantization config"].count("self_attn.") == 4
    assert not any("rule" in reason for reason in state["stays_bf16"])


def test_a_linear_that_sglang_multiplies_itself_is_bf16(ran: dict[str, Result]) -> None:
    result = ran["past"]
    assert result["state"]["layers"] == {"nvfp4": 24, "bf16": 8}
    reason = "SGLang multiplies by its weight itself"
    assert result["state"]["stays_bf16"][reason].startswith("model.layers.0.mlp.gate_up_proj, ")
    assert any(line.startswith(f"mixquant: stays BF16 ({reason}): model.layers.0.mlp.gate") for line in result["log"])
    packed = ran["past in decode"]["state"]["extra_weight_bytes"]
    assert 0.5 * packed < result["state"]["extra_weight_bytes"] < 0.6 * packed  # gate_up: 8 of 18.4 MiB
    assert result["after"]["tokens"]["prefill"] == {"bf16": 1, "nvfp4": PROMPT - 1}


def test_a_rule_that_asks_for_such_a_linear_ends_the_start(ran: dict[str, Result]) -> None:
    refused = ran["past a rule"]["refused"]
    assert "by_rule.yaml:4 layers: 're:.*\\.(gate_up|down)_proj' wants model.layers.0.mlp.gate_up_proj" in refused
    assert "multiplies by the weight itself" in refused and "optional: true" in refused and "\n" not in refused


def test_a_linear_that_is_missing_in_short_passes_alone_is_reported_as_such(ran: dict[str, Result]) -> None:
    state = ran["past in short passes"]["state"]
    assert state["layers"] == {"nvfp4": 16, "bf16": 16} and state["precision"]["prefill"] == "nvfp4"  # by rule
    reason = "SGLang multiplies by its weight itself in passes of 12 rows"
    assert state["stays_bf16"][reason].startswith("model.layers.0.mlp.gate_up_proj, ")
    assert ran["past in short passes"]["after"]["tokens"]["prefill"] == {"bf16": 1, "nvfp4": PROMPT - 1}


def test_a_linear_that_is_missing_in_decode_alone_is_reported_as_such(ran: dict[str, Result]) -> None:
    state = ran["past in decode"]["state"]
    assert state["layers"] == {"nvfp4": 32} and state["precision"] == {"prefill": "nvfp4", "decode": "nvfp4"}
    [(reason, names)] = [kept for kept in state["stays_bf16"].items() if kept[0] != TIED]
    assert reason == "SGLang multiplies by its weight itself in decode steps of 2 rows"
    assert names.startswith("model.layers.0.mlp.gate_up_proj, ")
