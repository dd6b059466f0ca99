"""Speculative decoding: the draft is SGLang's own, drafted rows are verified as rows are decoded and counted apart, and
the last layer leaves no row out that a draft reads.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import lifecycle, runtime
from mixquant_sglang.host.hooks import forward, graphs, load, weights
from mixquant_sglang.host.refusals import check_server_args
from mixquant_sglang.host.refused import DRAFTS
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import DECODE_PASS, current
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.versions.requests import reads_all_rows
from tests.support.processes import module

DRAFT, SERVED = SimpleNamespace(is_draft_worker=True), SimpleNamespace(is_draft_worker=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> runtime.Runtime:
    asked = recipe.load("nvfp4")
    made = runtime.Runtime(asked, select(asked, Device("this CPU", None)))
    monkeypatch.setattr(runtime, "_runtime", made)
    return made


# -- on SGLang's own model runner --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """About 30 s of one core."""
    done = subprocess.run(
        module("tests.support.run_speculation", tiny_model, "auto"),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=tmp_path_factory.mktemp("speculation"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_drafted_rows_are_verified_by_stock_sglang(played: dict[str, Any]) -> None:
    assert played["prompt is low"] and played["again"]
    assert played["verify is stock"]
    assert played["roles"] == ["prompt", "verify"]


@pytest.mark.slow
def test_drafted_rows_are_counted_apart(played: dict[str, Any]) -> None:
    counted = {phase: {p: n for p, n in rows.items() if n} for phase, rows in played["counted"].items()}
    assert counted == {"prefill": {"nvfp4+fp8": 39, "bf16": 1}, "decode": {}, "verify": {"bf16": 4}}


@pytest.mark.slow
def test_they_too_run_from_the_masters_while_weights_arrive(played: dict[str, Any]) -> None:
    assert played["held"]


@pytest.mark.slow
def test_a_draft_is_stock_and_not_counted(played: dict[str, Any]) -> None:
    assert played["draft is stock"] and not played["draft is low"]
    assert played["draft roles"] == ["decode"]
    assert not played["draft scheduled"] and not played["draft counted"]


@pytest.mark.slow
def test_tokens_alone_let_rows_be_left_out(played: dict[str, Any]) -> None:
    assert played["prunes"]  # NGRAM


# -- arguments ---------------------------------------------------------------------------------------------------------

ASK = """
import sys

from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.server_args import ServerArgs

from mixquant_sglang.versions.dialect import dialect

for draft in (None, "fp8"):
    args = ServerArgs(
        model_path=sys.argv[1],
        quantization="mixquant",
        device="cpu",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        speculative_algorithm="NGRAM",
        speculative_draft_model_quantization=draft,
    )
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    resolved = dialect().resolved(args)
    print(resolved.quantization, resolved.speculative_draft_model_quantization)
"""


@pytest.mark.slow
def test_a_draft_is_not_quantised_unless_asked(tiny_model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK, str(tiny_model)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["mixquant None", "mixquant fp8"]


@pytest.mark.parametrize("algorithm, allowed", [(name, True) for name in (*DRAFTS, "eagle")] + [("DFLASH", False)])
def test_which_drafts_are_allowed(algorithm: str, allowed: bool) -> None:
    args = SimpleNamespace(speculative_algorithm=algorithm, speculative_draft_model_quantization=None)
    if allowed:
        check_server_args(args)
        args.speculative_draft_model_quantization = "mixquant"
    with pytest.raises(MixQuantError, match="--speculative-"):
        check_server_args(args)


# -- hooks -------------------------------------------------------------------------------------------------------------


class Batch:
    """An extend batch that says no more than its mode and rows."""

    def __init__(self, mode: str, rows: int = 5) -> None:
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        self.forward_mode = ForwardMode[mode]
        self.input_ids = [1] * rows


def seen(*_: object, **__: object) -> Any:
    return current()


@pytest.mark.parametrize("mode", ["EXTEND", "DECODE", "DRAFT_EXTEND_V2", "TARGET_VERIFY"])
def test_a_pass_of_a_draft_is_let_through(mode: str, run: runtime.Runtime) -> None:
    forward.schedule_batch(Batch(mode), object, SimpleNamespace(), DRAFT)  # looks at no request
    assert forward.run_pass(seen, DRAFT, Batch(mode)) is DECODE_PASS
    assert not run.counters.tokens and not run.counters.passes


@pytest.mark.parametrize("mode, phase", [("TARGET_VERIFY", "verify"), ("DECODE", "decode")])
def test_the_phase_that_rows_count_for(mode: str, phase: str, run: runtime.Runtime) -> None:
    running = forward.run_pass(seen, SERVED, Batch(mode, 8))
    assert running.role.value == phase and running.rows is None
    assert run.counters.tokens == Counter({(phase, "bf16"): 8}) and run.counters.passes_of(phase) == 1


def test_prefill_graphs_of_a_draft_are_sglangs(run: runtime.Runtime) -> None:
    draft = SimpleNamespace(model_runner=DRAFT, prefill_backend_name="full", capture_num_tokens=[8], max_num_tokens=8)
    batch = Batch("EXTEND")
    assert graphs.capture_prefill(seen, draft, batch, 8) is DECODE_PASS  # whatever the back end
    assert run.graphs.protected is None
    assert graphs.can_replay_prefill(lambda *_: True, draft, batch)  # a batch without the facts of its requests
    assert not graphs.can_replay_prefill(lambda *_: False, draft, batch)
    graphs.load_prefill_rows(draft, batch)
    graphs.size_prefill_graphs(model_runner=DRAFT)
    assert graphs.can_replay_decode(lambda *_: True, draft, batch)

    served = SimpleNamespace(model_runner=SERVED)
    assert not graphs.can_replay_prefill(lambda *_: True, served, batch)
    with pytest.raises(AssertionError, match="without the facts of its requests"):
        graphs.load_prefill_rows(served, batch)


def test_loading_a_draft_changes_nothing(run: runtime.Runtime) -> None:
    class Refusing:
        loading = unproved = True

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    run.lifecycle = Refusing()  # type: ignore[assignment]
    load.finish_load(None, DRAFT)
    load.finish_attention(None, DRAFT)
    load.prove_model(model_runner=DRAFT, eager_runner=None)
    with pytest.raises(AssertionError, match="finish_load"):
        load.finish_load(None, SERVED)


def test_an_update_of_a_draft_is_sglangs(run: runtime.Runtime) -> None:
    updater = SimpleNamespace(get_model_runner=lambda: DRAFT)
    assert weights.weights_from_disk(lambda *_, **__: (True, "stock"), updater, "nowhere", "auto") == (True, "stock")
    assert weights.weights_from_tensor(lambda *_: (True, "stock"), updater, []) == (True, "stock")
    assert weights.weights_from_distributed(lambda *_: (True, "stock"), updater) == (True, "stock")
    weights.weights_begin(updater)
    assert run.weights.current
    weights.weights_end(None, updater)


# -- what is left out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm, prunes",
    [("NONE", True), ("NGRAM", True), ("STANDALONE", True), ("EAGLE", False), ("EAGLE3", False), ("DFLASH", False)],
)
def test_rows_that_a_draft_reads_are_not_left_out(
    algorithm: str, prunes: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = SimpleNamespace(split=True, prunes=False, local=False)
    made = lifecycle.LoadSteps(
        SimpleNamespace(
            schedule=schedule,
            recipe=SimpleNamespace(fuse=True),
            environment=Environment(),
            selection=SimpleNamespace(kernels={}),
        ),
        SimpleNamespace(ready=None),
    )
    monkeypatch.setattr(lifecycle.fused, "fuse", lambda _: Counter())
    monkeypatch.setattr(lifecycle.last_layer, "prune_last_layer", lambda _: True)
    runner = SimpleNamespace(model=None, is_generation=True, server_args=SimpleNamespace())
    runner.spec_algorithm = SimpleNamespace(name=algorithm)
    with caplog.at_level(logging.INFO):
        made._fuse(runner)
    assert schedule.prunes is prunes
    assert ("the draft reads hidden states of all rows" in caplog.text) is not prunes


@pytest.mark.parametrize("mode, reads", [("NULL", False), ("LAST", False), ("FULL", True)])
def test_which_hidden_states_are_handed_over(mode: str, reads: bool) -> None:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

    batch = SimpleNamespace(capture_hidden_mode=CaptureHiddenMode[mode], return_logprob=False)
    assert reads_all_rows(batch) is reads


def test_the_report_has_the_phase_where_the_server_speculates(run: runtime.Runtime) -> None:
    steps = lifecycle.LoadSteps(run, SimpleNamespace(ready=None))
    steps._speculate(SimpleNamespace(spec_algorithm=SimpleNamespace(name="NONE")))
    assert [*run.state()["tokens"]] == ["prefill", "decode"]
    steps._speculate(SimpleNamespace(spec_algorithm=SimpleNamespace(name="EAGLE")))
    run.count_prefill(run.schedule.prefill([RequestRows(5, 0, 90)], torch.device("cpu")))
    state = run.state()
    assert state["tokens"] == {"prefill": {"nvfp4": 5}, "decode": {}, "verify": {}}
    assert state["passes"] == {"prefill": 1, "decode": 0, "verify": 0}
