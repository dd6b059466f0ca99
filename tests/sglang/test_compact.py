"""Recipes that keep no BF16 weights, on real ``ModelRunner``s: what they compute, hold and take as new weights."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import fp8, nvfp4
from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks import checker, launcher
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.kernels.linear.w4a16 import EmulatedW4A16
from mixquant_sglang.recipe import load
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED
from mixquant_sglang.recipe.roles import by_role
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.weights.incoming import Known
from mixquant_sglang.weights.refresh import Weights
from mixquant_sglang.weights.staging import Absent
from tests.support import exact_checkpoints, model_runs
from tests.support.processes import module
from tests.support.run_model import STEPS

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen3"
Results = dict[str, Any]
CASES = (
    ("fp8", "fp8", [37, 20]),
    ("fp8", "fp8-compact", [37, 20]),
    ("fp8", "bf16", [37]),
    ("fp8", "w8a16", [37]),
    ("nvfp4", "nvfp4", [37, 20]),
    ("nvfp4", "nvfp4-compact", [37, 20]),
    ("nvfp4", "bf16", [37]),
    ("nvfp4", "w4a16", [37]),
)
DECODES = {"fp8-compact": "w8a16", "nvfp4-compact": "w4a16"}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exact")
    return {fmt: exact_checkpoints.write(TINY, folder / fmt, fmt) for fmt in ("fp8", "nvfp4")}


@pytest.fixture(scope="module")
def runs(exact: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Results]:
    cases = [
        {"model": str(exact[fmt]), "recipe": recipe, "prompts": prompts, "fp32_sums": True}
        for fmt, recipe, prompts in CASES
    ]
    found = model_runs.run(cases, tmp_path_factory.mktemp("runs"), model_runs.CPU, 600)
    return {(fmt, recipe): result for (fmt, recipe, _), result in zip(CASES, found, strict=True)}


def test_the_checkpoints_are_exact(exact: dict[str, Path]) -> None:
    """Else the comparisons below would say nothing."""
    name = "model.layers.0.self_attn.{}_proj.weight"
    for fmt, folder in exact.items():
        tensors = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        weight = torch.cat([tensors[name.format(part)] for part in "qkv"])
        if fmt == "fp8":
            again = fp8.quantize(weight).dequantize(torch.float32)
        else:
            (part,) = EmulatedNVFP4(weight, scales="search").parts
            again = part.dequantize(torch.float32)
        assert torch.equal(again, weight.float()), fmt


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("fmt", "compact", "plain"),
    [
        ("fp8", "fp8-compact", "fp8"),
        ("fp8", "w8a16", "bf16"),
        ("nvfp4", "nvfp4-compact", "nvfp4"),
        ("nvfp4", "w4a16", "bf16"),
    ],
)
def test_logits_are_those_of_the_same_weights_in_bf16(
    runs: dict[tuple[str, str], Results], fmt: str, compact: str, plain: str
) -> None:
    """Bit by bit, at every step: prompt rows take the same kernel, and so leave the same keys and values; protected and
    decode rows multiply by the same numbers, added in the same order.  ``runs`` sees to the order, and the checkpoints
    to scales that are powers of two: applied to a sum they change no bit of it."""
    one, other = runs[fmt, compact], runs[fmt, plain]
    assert "tokens" in one and "tokens" in other, (one, other)
    assert len(one["bits"]) == STEPS + 1
    assert (one["tokens"], one["bits"]) == (other["tokens"], other["bits"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compact", DECODES)
def test_what_ran_is_what_is_said(runs: dict[tuple[str, str], Results], compact: str) -> None:
    low, decodes = compact.removesuffix("-compact"), DECODES[compact]
    found, plain = runs[low, compact], runs[low, low]
    tokens, before = found["after"]["tokens"], plain["after"]["tokens"]
    assert tokens["prefill"] == {low: before["prefill"][low], decodes: before["prefill"]["bf16"]}
    assert tokens["decode"] == {decodes: before["decode"]["bf16"]}
    state, held = found["state"], {"fp8": 0.51, "nvfp4": 0.29}[low]
    assert state["linear_weight_bytes"] < held * state["bf16_linear_bytes"]
    assert plain["state"]["linear_weight_bytes"] > state["bf16_linear_bytes"]
    words = {"fp8": "FP8", "nvfp4": "NVFP4"}[low] + " weights, BF16 activations"
    assert state["generated_from"] == words and plain["state"]["generated_from"] == "BF16"
    assert f"mixquant: generated tokens come from {words}; no BF16 weights are kept for them" in found["log"]
    assert state["roles"]["decode"]["linear"] == state["roles"]["protected"]["linear"] == decodes


@pytest.fixture(scope="module", params=["fp8-compact", "nvfp4-compact"])
def updates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("updates")
    done = subprocess.run(
        module("tests.support.run_compact", TINY, folder, request.param),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Results = json.loads(done.stdout.splitlines()[-1])
    return found | {"decodes": DECODES[request.param]}


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_one_copy_is_held_and_loading_takes_no_more_than_a_layer(updates: Results) -> None:
    loaded = updates["loaded"]
    assert loaded["absent"][0] == loaded["absent"][1] == 32
    assert 0 < loaded["peak"] <= loaded["block"] and loaded["left"] == 0
    assert loaded["held"] < {"w8a16": 0.51, "w4a16": 0.29}[updates["decodes"]] * loaded["bf16"]
    state = loaded["state"]
    assert loaded["held"] == state["linear_weight_bytes"] == state["packed_weight_bytes"]
    assert state["extra_weight_bytes"] == state["linear_weight_bytes"] - state["bf16_linear_bytes"] < 0
    assert updates["peak at the end"] <= loaded["block"]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_updates_are_packed_as_they_arrive_or_refused_whole(updates: Results) -> None:
    decodes, start = updates["decodes"], updates["start"]
    assert start["fresh"]
    refused = {
        "some parts": "model.layers.1.self_attn.q_proj.weight came without model.layers.1.self_attn.k_proj.weight, ",
        "nan": "model.layers.2.mlp.down_proj.weight holds NaN or infinity",
        "direct": "model.layers.2.mlp.down_proj.weight is not kept in BF16 by this recipe; send the checkpoint's",
    }
    for label, message in refused.items():
        found = updates[label]
        assert not found["done"] and found["message"].startswith(message), found
        assert found["same"] and found["prefill"] == start["prefill"] and not found["warnings"]
    for label in ("good", "back", "ipc", "disk", "disk back", "packing works again"):
        found = updates[label]
        assert found["done"] and found["fresh"] and found["prefill"] == start["prefill"], (label, found)
        assert found["same"] is (label not in ("good", "disk"))
    assert updates["addresses"]  # captured graphs hold them
    failed = updates["packing fails"]
    assert failed["prefill"] == {decodes: 40} and failed["decode"] == {decodes: 1}
    assert failed["warnings"] == [
        f"mixquant: passes run in {decodes} whole, as packed last, until a weight update succeeds: cannot pack "
        "model.layers.2.mlp.down_proj: out of memory"
    ]


@pytest.mark.parametrize("head", ["model.", "", "model.language_model.", "language_model.model."])
def test_parts_of_a_weight_are_known_by_the_names_of_the_checkpoint(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an update with some of them would be taken, and half of it lost."""
    from mixquant_sglang.host import report
    from mixquant_sglang.layers import packed
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    monkeypatch.setattr(packed, "loads_dummy", lambda: False)
    asked = load("fp8-compact")
    run, linear, model = Runtime(asked, select(asked, Device("this CPU", None))), torch.nn.Module(), torch.nn.Module()
    method = MixQuantLinearMethod(run, "model.layers.0.self_attn.qkv_proj", "fp8", "w8a16")
    method.create_weights(linear, 64, [32, 16, 16], 64, 64, torch.bfloat16, weight_loader=None)
    monkeypatch.setattr(report, "linears", lambda _: [("model.layers.0.self_attn.qkv_proj", method)])
    parts = {f"{head}layers.0.self_attn.{part}_proj.weight": ((32, 64), torch.bfloat16) for part in "qkv"}
    tower = {"visual.layers.0.self_attn.q_proj.weight": ((32, 64), torch.bfloat16)}
    known = Known(tensors=parts | tower)
    report.note_wholes(model, known, RuleMatcher((), FUSED))
    first, *_ = sorted(parts)
    assert known.torn({*parts}) is None and (known.torn({first}) or "").startswith(f"{first} came without ")


@pytest.mark.parametrize(("masterless", "how"), [(True, "in w8a16 whole, as packed last"), (False, "in BF16 whole")])
def test_the_answer_to_an_update_says_how_passes_run(masterless: bool, how: str) -> None:
    from mixquant_sglang.host.hooks.weights import _with_packing

    weights = Weights()
    layer = SimpleNamespace(masterless=masterless, precision=by_role("fp8", "w8a16"), forget_arrived=lambda: None)
    weights.layers.append(layer)  # type: ignore[arg-type]
    weights.broken("an update failed")
    said = _with_packing(SimpleNamespace(weights=weights), "Succeeded.")  # type: ignore[arg-type]
    assert said == f"Succeeded. mixquant: an update failed; passes run {how}"


def test_linears_whose_parts_are_others_are_warmed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor scales of q, k and v may be equal in some blocks of a checkpoint, and differ in others."""
    from mixquant_sglang.kernels.triton import warm_up as kernels
    from mixquant_sglang.layers.warm_up import warm_up

    warmed: list[int] = []
    monkeypatch.setattr(kernels, "weight_only", lambda packed, *_: warmed.append(len(packed.tensors())))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)

    def method(*rows: int) -> Any:
        parts = [nvfp4.quantize(torch.randn(n, 32).bfloat16()) for n in rows]
        reader = EmulatedW4A16(torch.empty(sum(rows), 32), ready=parts)
        made = SimpleNamespace(shape=(sum(rows), 32), bias=None, low={"w4a16"}, invariant=False, split=False)
        made.copy_in, made.split_product = lambda _: reader, None
        return made

    methods = [method(32, 16), method(48), method(32, 16), method(16, 32)]
    warm_up(torch.nn.Module(), methods, [], [], torch.device("cpu"))
    assert warmed == [6, 3, 6]


class _Checked(torch.nn.Module):
    """A norm before a linear whose weight is kept, or not."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16), requires_grad=False)
        weight = torch.zeros(4, 8, dtype=torch.bfloat16)
        self.weight = torch.nn.Parameter(weight, False) if kept else Absent(weight.to("meta"), False)


def _checker(model: torch.nn.Module) -> Any:
    """SGLang's, of ``model``, as a server that runs it calls it."""
    from sglang.srt.utils.weight_checker import WeightChecker

    checker: Any = object.__new__(WeightChecker)
    checker._get_model = lambda: model
    more = {"role": "target"} if "role" in inspect.signature(WeightChecker.handle).parameters else {}

    def check_weights(_runner: Any, action: str) -> Any:
        return checker.handle(action=action, **more)

    return check_weights


def _run_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    asked = load(name)
    run = Runtime(asked, select(asked, Device("this CPU", None)))
    monkeypatch.setattr(runtime, "_runtime", run)
    return run


RUNNER = SimpleNamespace(is_draft_worker=False)


@pytest.mark.parametrize("action", ["reset_tensors", "snapshot", "compare", "checksum"])
def test_the_weights_checker_is_refused_before_anything_is_overwritten(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _Checked(kept=False)
    _run_of("fp8-compact", monkeypatch)
    with pytest.raises(MixQuantError, match=r"^/weights_checker: recipe fp8-compact keeps no BF16 weights"):
        checker.check_weights(_checker(model), RUNNER, action=action)
    assert not model.norm.any()
    if action == "reset_tensors":
        draft = SimpleNamespace(is_draft_worker=True)  # whose weights are SGLang's own
        checker.check_weights(_checker(draft_model := _Checked(kept=True)), draft, action=action)
        assert draft_model.norm.any()


@pytest.mark.parametrize("fails", [False, True])
def test_weights_that_the_checker_overwrote_are_packed_anew(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else prefill would multiply by the numbers of before, and decode by random ones."""
    run, packed = _run_of("fp8", monkeypatch), []
    run.weights.layers.append(
        SimpleNamespace(name="a", masterless=False, by_value=(), pack=lambda: packed.append(run.weights.current))  # type: ignore[arg-type]
    )
    checker.check_weights(_checker(_Checked(kept=True)), RUNNER, action="snapshot")
    assert run.weights.current and run.weights.refresh() is None and not packed
    if fails:
        with pytest.raises(TypeError, match="not kept in BF16"):
            checker.check_weights(_checker(_Checked(kept=False)), RUNNER, action="reset_tensors")
    else:
        checker.check_weights(_checker(_Checked(kept=True)), RUNNER, action="reset_tensors")
    assert not run.weights.current
    assert run.weights.refresh() is None and run.weights.current and packed == [False]


@pytest.mark.parametrize(("recipe", "says"), [("fp8-compact", True), ("nvfp4-compact", True), ("fp8", False)])
@pytest.mark.parametrize("found", [None, [[0.5], None], [0.5, 1.0]])
def test_a_weight_that_is_not_kept_has_no_numbers_and_that_is_said(
    recipe: str, says: bool, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.asked, "recipe", load(recipe))

    async def original(_manager: Any, _obj: Any, _request: Any) -> Any:
        return found

    name = "model.layers.0.self_attn.q_proj.weight"
    answer = checker.weights_by_name(original, None, SimpleNamespace(name=name), None)
    if says and found != [0.5, 1.0]:
        with pytest.raises(MixQuantError, match=f"no numbers of {name}: recipe {recipe} keeps no BF16 weights"):
            asyncio.run(answer)
    else:
        assert asyncio.run(answer) == found


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_session_may_bring_the_parts_one_by_one(updates: Results) -> None:
    if "session" not in updates:
        return  # SGLang 0.5.17 has none: each call is an update of its own
    decodes = updates["decodes"]
    for label in ("session", "session, more"):
        assert updates[label]["done"] and updates[label]["prefill"] == {decodes: 40}
    assert updates["session over"]["fresh"] and not updates["session over"]["same"]
    cut = updates["session cut"]
    assert cut["prefill"] == {decodes: 40} and "only parts of its weight arrived" in cut["warned"][-1]
    assert updates["session mended"]["same"] and updates["session mended"]["fresh"]
