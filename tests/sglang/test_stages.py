"""A pipeline of two stages on SGLang's own model runner: two processes over gloo, each with half of the layers.

Recipe bf16 is stock to the last bit, so is a request's BF16 prefill, each stage counts every row, and the first one
tells what all of them hold.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import caches, model_runs
from tests.support.processes import module
from tests.support.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RULE = (
    "version: 1\nprefill: {precision: fp8}\nlayers:\n  - {match: 're:.*layers.LAYER.mlp.down_proj$', prefill: bf16}\n"
)


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each stage: the results of the cases by name."""
    folder = tmp_path_factory.mktemp("stages")
    cases = caches.cases(str(tiny_model), {"pp_size": 2})
    for name, layer in (("ruled", "7"), ("no such layer", "70")):
        (folder / f"{layer}.yaml").write_text(RULE.replace("LAYER", layer))
        cases[name] = {**cases["bf16"], "recipe": str(folder / f"{layer}.yaml")}
    env = {**os.environ, **model_runs.CPU, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    if "resolve_once" not in _names_of_server_args():  # 0.5.17 wants as many as there are TP ranks
        del env["SGLANG_CPU_OMP_THREADS_BIND"]
    port = free_port()
    command = module("tests.support.run_stages", json.dumps([*cases.values()]))
    logs = [(folder / f"stage-{rank}.log").open("wb") for rank in range(2)]
    stages = [
        subprocess.Popen([*command, str(rank), str(port)], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        said = [stage.communicate(timeout=800)[0].decode() for stage in stages]
    finally:
        for stage, log in zip(stages, logs, strict=True):
            stage.kill()
            stage.wait()
            log.close()
    out = []
    for rank, text in enumerate(said):
        results = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        assert len(results) == len(cases), (folder / f"stage-{rank}.log").read_text(errors="replace")[-3000:]
        out.append(dict(zip(cases, results, strict=True)))
    return out


def _names_of_server_args() -> list[str]:
    from sglang.srt.server_args import ServerArgs

    return dir(ServerArgs)


def test_the_last_stage_is_stock(ran: list[dict[str, Any]]) -> None:
    last = {name: ran[1][name] for name in caches.KINDS}
    assert not caches.problems(last)
    assert "bits" in last["stock"], caches.ended(last["stock"])


def test_each_stage_counts_every_row(ran: list[dict[str, Any]]) -> None:
    first, last = (stage["auto"]["after"] for stage in ran)
    assert first["tokens"] == last["tokens"] and first["protected_rows"] == last["protected_rows"] == 2


def test_what_each_stage_holds(ran: list[dict[str, Any]]) -> None:
    first, last = (stage["auto"]["after"] for stage in ran)
    assert first["stages"] == last["stages"] and len(first["stages"]) == 2 and first["layers"] == last["layers"]
    for state, own in zip((first, last), first["stages"], strict=True):
        assert state["extra_weight_bytes"] == own["extra_weight_bytes"] > 0
        assert sum(n for precision, n in own["layers"].items() if precision != "bf16") == 16  # four layers of four
    logs = ["\n".join(stage["auto"]["log"]) for stage in ran]
    assert all("a tiny prompt ran 16 of 16 low linears" in log for log in logs)
    assert ["unread rows left out behind the last layer's attention" in log for log in logs] == [False, True]


def test_rules_are_for_the_layers_of_all_stages(ran: list[dict[str, Any]]) -> None:
    for stage in ran:
        assert "refused" not in stage["ruled"]
        assert "matches no layer" in stage["no such layer"]["refused"]
