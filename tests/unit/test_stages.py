"""What the stages of a pipeline settle together: two processes over gloo, each with half of a model's layers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.select import Device, select
from tests.support.processes import importable_when_spawned

LAYERS = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
RULES = "version: 1\nprefill: {precision: fp8}\nlayers:\n  - {match: 're:.*layers.MATCH.mlp.*', prefill: bf16}\n"


def stage(rank: int, match: str, folder: Path) -> None:
    from sglang.srt.distributed import parallel_state

    from mixquant_sglang.host import probe
    from mixquant_sglang.host.assignment import Assignment
    from mixquant_sglang.host.lifecycle import LoadSteps
    from mixquant_sglang.host.runtime import Runtime
    from mixquant_sglang.versions import groups

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    parallel_state._PP = parallel_state._WORLD = SimpleNamespace(world_size=2, cpu_group=dist.group.WORLD)
    asked = recipe.load(str(folder / "recipe.yaml"))
    selection = select(asked, Device("a GPU", (9, 0)))
    run = Runtime(asked, selection)
    assignment = Assignment(asked, selection, None)
    precisions = [assignment.of(name, {}).prefill for name in LAYERS[2 * rank : 2 * rank + 2]]
    run.precisions.update(Counter(precisions))
    run.stays_bf16["by rule"] = [f"of stage {rank}"]
    said: dict[str, Any] = {}
    try:
        LoadSteps(run, assignment)._check_rules()
    except MixQuantError as error:
        said["refused"] = str(error)
    run.stages = groups.over_stages(run.stage())
    said["state"] = {name: run.state()[name] for name in ("layers", "stays_bf16", "stages")}

    def build() -> str:
        if rank == 1:
            raise RuntimeError("this stage cannot")
        return "a batch"

    try:
        probe._build(build)
    except probe.Unproven as error:
        said["unproven"] = str(error)
    (folder / str(rank)).write_text(json.dumps(said))
    dist.destroy_process_group()


def answers(match: str, folder: Path) -> list[dict[str, Any]]:
    (folder / "recipe.yaml").write_text(RULES.replace("MATCH", match))
    with importable_when_spawned():
        mp.spawn(stage, (match, folder), nprocs=2, join=True)
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.slow
def test_a_rule_may_be_for_another_stages_layers(tmp_path: Path) -> None:
    found = answers("3", tmp_path)
    for said in found:
        assert "refused" not in said
        state = said["state"]
        assert state["layers"] == {"fp8": 3, "bf16": 1}
        assert state["stays_bf16"]["by rule"] == "of stage 0, of stage 1"
        assert [one["layers"] for one in state["stages"]] == [{"fp8": 2}, {"fp8": 1, "bf16": 1}]
        assert said["unproven"] == "RuntimeError: this stage cannot"


@pytest.mark.slow
def test_a_rule_for_no_stage_ends_the_start_of_all(tmp_path: Path) -> None:
    for said in answers("7", tmp_path):
        assert "recipe.yaml:4 layers.match" in said["refused"] and "matches no layer" in said["refused"]


def test_one_stage_settles_with_itself() -> None:
    from mixquant_sglang.versions import groups

    assert groups.stages() == 1 and groups.over_stages("mine") == ["mine"]
    assert groups.from_previous_stage() is None
    groups.to_next_stage(None)
