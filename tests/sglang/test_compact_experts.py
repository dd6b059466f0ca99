"""Recipes that keep no BF16 weights of experts, on a real ``ModelRunner`` of a mixture."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.support.processes import module

Results = dict[str, Any]
DECODES = {"fp8-compact": "w8a16", "nvfp4-compact": "w4a16"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=[*DECODES])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("experts")
    done = subprocess.run(
        module("tests.support.run_compact_experts", folder, request.param),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Results = json.loads(done.stdout.splitlines()[-1])
    return found | {"low": request.param.removesuffix("-compact"), "decodes": DECODES[request.param]}


def test_experts_are_held_once_and_loading_takes_no_more_than_an_expert(run: Results) -> None:
    loaded, state = run["loaded"], run["loaded"]["state"]
    assert loaded["absent"] == [4, 4]
    assert 0 < loaded["peak"] <= loaded["expert"] and loaded["left"] == 0
    assert loaded["held"] < {"fp8": 0.54, "nvfp4": 0.32}[run["low"]] * loaded["bf16"]
    assert state["experts"] == {run["low"]: 2}
    assert loaded["held"] < state["linear_weight_bytes"] < 0.56 * state["bf16_linear_bytes"]
    assert state["bf16_linear_bytes"] > loaded["bf16"]
    assert state["roles"]["decode"]["experts"] == state["roles"]["protected"]["experts"] == run["decodes"]


def test_updates_of_experts_are_whole_or_refused(run: Results) -> None:
    start, decodes = run["start"], run["decodes"]
    assert start["fresh"] and start["decode"] == {decodes: 1}
    assert start["prefill"] == {run["low"]: 39, decodes: 1}
    refused = {
        "a gate alone": "model.layers.1.mlp.experts.2.gate_proj.weight came without "
        "model.layers.1.mlp.experts.2.up_proj.weight: this recipe keeps no BF16 weight of ",
        "nan": "model.layers.1.mlp.experts.2.down_proj.weight holds NaN or infinity",
        "direct": "model.layers.1.mlp.experts.w2_weight is not kept in BF16 by this recipe",
    }
    for label, message in refused.items():
        found = run[label]
        assert not found["done"] and found["message"].startswith(message), found
        assert found["same"] and found["prefill"] == start["prefill"] and not found["warnings"]
    for label in ("one matrix", "gate and up", "back", "distributed", "disk"):
        found = run[label]
        assert found["done"] and found["fresh"] and found["prefill"] == start["prefill"], (label, found)
        assert found["same"] is (label not in ("one matrix", "gate and up")), label
    assert run["addresses"]  # captured graphs hold them
    assert run["peak at the end"] <= run["loaded"]["expert"]


def test_a_session_that_brings_half_an_expert_is_noticed(run: Results) -> None:
    if "session cut" not in run:
        return  # SGLang 0.5.17 has none: each call is an update of its own
    cut = run["session cut"]
    assert cut["prefill"] == {run["decodes"]: 40}
    assert "only parts of w13_weight of expert 2 arrived" in cut["warned"][-1]
    assert run["session mended"]["same"] and run["session mended"]["fresh"]
