"""Weight updates on a real ``ModelRunner``: taken whole, or refused with the old weights serving on bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.host import runtime
from mixquant_sglang.recipe import load
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.weights.arriving import Arriving
from mixquant_sglang.weights.refresh import Weights
from tests.support.processes import module

DOWN = "model.layers.2.mlp.down_proj.weight"
Results = dict[str, Any]


@pytest.fixture(scope="module")
def results(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("updates")
    recipe = folder / "recipe.yaml"
    recipe.write_text("version: 1\nprefill: {precision: nvfp4}\nweights: {scales: absmax}\n")
    done = subprocess.run(
        module("tests.support.updates", random_model, folder, recipe),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Results = json.loads(done.stdout.splitlines()[-1])
    return found


REFUSED = {
    "disk nan": f"DIR/nan: {DOWN} holds NaN or infinity, in BF16 at least; the old weights serve on",
    "disk inf in a norm": "DIR/inf in a norm: model.norm.weight holds NaN or infinity",
    "disk missing": f"DIR/missing: {DOWN} is missing; the old weights serve on",
    "disk extra": "DIR/extra: model.extra.weight is no tensor of this model's checkpoint",
    "disk shape": f"DIR/shape: {DOWN} has shape [",
    "disk fp8": f"DIR/fp8: {DOWN} is torch.float8_e4m3fn, not torch.bfloat16: a quantised checkpoint",
    "disk too large for bf16": f"DIR/too large for bf16: {DOWN} holds NaN or infinity, in BF16 at least",
    "disk cut": "DIR/cut: ",
    "disk nowhere": "DIR/nowhere: ",
    "disk dummy": "Failed to get model loader: ",
    "disk stops half way": "Failed to update weights: Input/output error.",
    **{f"{how} nan": f"{DOWN} holds NaN or infinity" for how in ("tensor", "distributed", "ipc", "direct")},
    **{f"{how} shape": f"{DOWN} has shape [" for how in ("tensor", "distributed", "ipc", "direct")},
    **{f"{how} unknown": "model.layers.99.mlp.down_proj.weight is no" for how in ("tensor", "distributed", "ipc")},
    "direct unknown": "model.layers.0.mlp.gate_proj.weight is no parameter of the model; the old weights serve on",
    "tensor merged": "model.layers.0.self_attn.qkv_proj.weight is no tensor of this model's checkpoint",
    "ipc dies": "the sender is gone; the old weights serve on",
    "unknown format": "Unknown load_format=no-such-format; the old weights serve on",
    "custom loader": "mixquant: load_format a.custom.loader: custom weight loaders write past the check",
}


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("label", REFUSED)
def test_a_broken_update_leaves_the_old_weights_serving(results: Results, label: str) -> None:
    found, start = results[label], results["start"]
    assert found["done"] is False and found["message"].startswith(REFUSED[label]), found["message"]
    assert found["same"] and found["prefill"] == start["prefill"] and not found["warnings"]
    assert found["path"] == start["path"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["disk", "tensor", "direct", "fp32", "distributed", "ipc"])
def test_a_good_update_packs_the_new_weights(results: Results, how: str) -> None:
    """1000 times smaller, and back: the numbers are those of packing anew, and then those of the start."""
    good, back, start = results[f"{how} good"], results[f"{how} back"], results["start"]
    assert good["done"] is True and not good["same"] and good["fresh"]
    assert good["path"] == ("DIR/small" if how == "disk" else start["path"])
    assert back["done"] is True and back["same"] and back["fresh"]
    assert good["prefill"] == back["prefill"] == start["prefill"] == {"bf16": 1, "nvfp4": 39}


@pytest.mark.slow
def test_what_sglang_skips_may_be_in_a_checkpoint(results: Results) -> None:
    found = results["disk skipped"]
    assert found["done"] and found["same"] and found["fresh"]


@pytest.mark.slow
def test_an_update_by_ipc_goes_to_the_device_tensor_by_tensor(results: Results) -> None:
    """A list of all of them would not fit beside weights and KV; nor does SGLang prepare the old weights again."""
    assert results["ipc good"]["given"] == ["generator"]
    assert results["ipc"]["hooks"] and not any(name.startswith("sglang.") for name in results["ipc"]["hooks"])


def test_graphs_are_not_captured_anew_with_other_numbers_than_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode graphs alone would hold the new tensor scales, and be replayed when the old ones are back."""
    from mixquant_sglang.host.hooks.weights import weights_from_disk

    layer = SimpleNamespace(decodes_by_value=True, name="a")
    run = SimpleNamespace(weights=Weights())
    run.weights.layers.append(layer)
    monkeypatch.setattr(runtime, "_runtime", run)

    def original(*_args: Any, **_kwargs: Any) -> tuple[bool, str]:
        raise AssertionError("nothing is written")

    updater = SimpleNamespace(get_model_runner=lambda: SimpleNamespace(is_draft_worker=False))
    done, message = weights_from_disk(original, updater, "PATH", "auto", recapture_cuda_graph=True)
    assert not done and message.startswith("mixquant: recapture_cuda_graph: ")


@pytest.mark.parametrize(
    ("name", "holds"),
    [("nvfp4-everywhere", True), ("nvfp4-emulated", False), ("nvfp4-compact", False), ("fp8-compact", False)],
)
def test_whose_decode_graphs_hold_numbers_by_value(name: str, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.layers import packed
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    monkeypatch.setattr(packed, "loads_dummy", lambda: False)
    asked = load(name)
    run = runtime.Runtime(asked, select(asked, Device("this CPU", None)))
    method = MixQuantLinearMethod(run, "linear", run.selection.prefill, run.selection.decode)
    layer = torch.nn.Module()
    method.create_weights(layer, 64, [32], 64, 32, torch.bfloat16, weight_loader=lambda p, w: p.data.copy_(w))
    layer.weight.weight_loader(layer.weight, torch.ones(32, 64, dtype=torch.bfloat16))
    run.weights.finish_load()
    assert run.weights.decodes_by_value is holds


def test_a_machine_that_cannot_look_at_new_weights_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.host.hooks.weights import weights_from_distributed

    def problem(*_args: Any) -> str | None:
        raise RuntimeError("CUDA out of memory")

    run = SimpleNamespace(weights=Weights(), known=SimpleNamespace(problem=problem), arriving=Arriving())
    monkeypatch.setattr(runtime, "_runtime", run)
    model = torch.nn.Module()
    model.load_weights = None
    served = SimpleNamespace(is_draft_worker=False)
    updater = SimpleNamespace(get_model=lambda: model, device="cpu", get_model_runner=lambda: served)

    def original(_updater: Any) -> tuple[bool, str]:
        model.load_weights([("a", torch.zeros(2))])
        return True, "done"

    assert weights_from_distributed(original, updater) == (False, "CUDA out of memory; the old weights serve on")
    assert run.weights.current


@pytest.mark.slow
def test_an_interrupted_reading_goes_back_to_the_old_checkpoint(results: Results) -> None:
    found = results["disk stops half way"]
    assert found["calls"] == 2 and found["message"].endswith(f"the weights are those of {found['path']} again")


@pytest.mark.slow
def test_a_failed_packing_serves_bf16_until_a_later_one_works(results: Results) -> None:
    for label in ("packing fails", "packing failed", "packing fails, disk"):
        found = results[label]
        assert found["prefill"] == {"bf16": 40} and found["decode"] == {"bf16": 1} and not found["same"]
    assert results["packing fails"]["done"] and results["packing fails, disk"]["done"]
    warnings = [results[label]["warnings"] for label in ("packing fails", "packing failed")]
    assert [len(lines) for lines in warnings] == [1, 0]
    assert warnings[0][0].startswith("mixquant: passes run in BF16 whole until a weight update succeeds: cannot pack ")
    assert "cannot pack" in results["packing fails, disk"]["message"]
    assert results["packing works again"]["same"] and results["packing works again"]["fresh"]


@pytest.mark.slow
def test_an_open_session_serves_bf16(results: Results) -> None:
    if "session" not in results:
        return  # SGLang 0.5.17 has none: each call is an update of its own
    assert results["session"]["done"] and results["session"]["prefill"] == {"bf16": 40}
    assert results["session over"]["same"] and results["session over"]["fresh"]


@pytest.mark.slow
def test_released_memory(results: Results) -> None:
    assert results["released"]["current"] is False and results["kv cache released"]["current"] is True
    resumed, reloaded = results["resumed"], results["resumed, reloaded"]
    assert resumed["prefill"] == {"bf16": 40} and len(resumed["warnings"]) == 1
    assert reloaded["done"] and reloaded["same"] and reloaded["fresh"]
