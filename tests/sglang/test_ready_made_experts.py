"""Ready-made experts in a whole model on SGLang's own model runner: what runs them, and what ends the start."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.weights.layouts import MODELOPT
from tests.support import tiny_models
from tests.support.processes import module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = "version: 1\nprefill: {{precision: nvfp4{}}}\nkernel: emulated\n{}"
KEPT = "layers:\n  - {match: 're:.*1\\.mlp\\.experts$', prefill: fp8}\n"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("experts")
    model = tiny_models.make(folder, "qwen3_moe")
    quantize_checkpoint(model, folder / "ready", scales="search")
    quantize_checkpoint(model, folder / "modelopt", layout=MODELOPT, ignore=["model.layers.1.mlp.experts"])
    quantize_checkpoint(model, folder / "same", layout=MODELOPT, scales="search")
    quantize_checkpoint(model, folder / "other")
    quantize_checkpoint(model, folder / "absmax")
    weights = load_file(folder / "other" / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.down_proj.weight_packed"
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "other" / "model.safetensors")
    cases: dict[str, tuple[str, str]] = {
        "packed": ("", ""),
        "ready": (f", weights: {folder / 'ready'}", ""),
        "same": (f", weights: {folder / 'same'}", ""),
        "absmax": (f", weights: {folder / 'absmax'}", ""),
        "modelopt": (f", weights: {folder / 'modelopt'}", ""),
        "kept": (f", weights: {folder / 'ready'}", KEPT),
        "other": (f", weights: {folder / 'other'}", ""),
    }
    for case, parts in cases.items():
        (folder / f"{case}.yaml").write_text(RECIPE.format(*parts))
    asked = [{"model": str(model), "recipe": str(folder / f"{case}.yaml")} for case in cases]
    done = subprocess.run(
        module("tests.support.run_model", json.dumps(asked)),
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


def test_ready_made_experts_run(ran: dict[str, dict[str, Any]]) -> None:
    packed, ready = ran["packed"], ran["ready"]
    assert packed["state"]["experts"] == ready["state"]["experts"] == {"nvfp4": 2}
    assert packed["state"]["layers"] == ready["state"]["layers"]
    assert ready["state"]["extra_weight_bytes"] == pytest.approx(packed["state"]["extra_weight_bytes"], rel=0.01)
    assert ready["tokens"] == ran["same"]["tokens"]  # the other layout's
    assert ready["tokens"] != ran["absmax"]["tokens"]


def test_experts_that_the_checkpoint_keeps_are_reported(ran: dict[str, dict[str, Any]]) -> None:
    state = ran["modelopt"]["state"]
    assert state["experts"] == {"nvfp4": 1, "bf16": 1}
    assert state["stays_bf16"]["not in the ready-made weights"] == "model.layers.1.mlp.experts"


def test_a_rule_for_experts_leaves_theirs_unused(ran: dict[str, dict[str, Any]]) -> None:
    assert ran["kept"]["state"]["experts"] == {"nvfp4": 1, "fp8": 1}


def test_experts_of_another_model_end_the_start(ran: dict[str, dict[str, Any]]) -> None:
    refused = ran["other"]["refused"]
    assert "experts.2.down_proj.weight_packed is not this weight of the BF16 checkpoint, rounded" in refused
    assert "\n" not in refused
