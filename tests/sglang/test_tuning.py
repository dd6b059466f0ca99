"""What was timed at load on several ranks: one choice for all of them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host import tuning
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.tuning.expert_tiles import TileTable
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell, GemmTable
from mixquant_sglang.recipe.select import Device, select

HERE = torch.device("cpu")
WIDE, TALL = (96, 64, 256), (64, 96, 256)


def cell(cutlass: float, cublas: float) -> Cell:
    return Cell({"cutlass": cutlass, "cublas": cublas}, {})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is used in the end, by the ranks' cells in their order ("ranks", None: this one's)."""
    found: dict[str, Any] = {"asked": 0}

    def over_ranks(own: Any) -> list[Any]:
        found["asked"] += 1
        return [own if cells is None else cells for cells in found["ranks"]]

    monkeypatch.setattr(tuning, "over_ranks", over_ranks)
    monkeypatch.setattr(tuning, "prefill_rows", lambda runner: [256])
    monkeypatch.setattr(tuning.machine, "kernel_versions", dict)
    monkeypatch.setattr(tuning.fp8_cache, "load_or_tune", lambda *_: GemmTable(found["own"]))
    monkeypatch.setattr(tuning.expert_cache, "load_or_tune", lambda *_: TileTable(found["own"]))
    for module in (tuning.fp8_gemm, tuning.expert_tiles):
        monkeypatch.setattr(module, "use", lambda table: found.update(table=table))
    return found


def runtime() -> Runtime:
    return Runtime((asked := recipe.load("fp8")), select(asked, Device("an H200", (9, 0))))


def linear(shapes: list[tuple[int, int]]) -> Any:
    return SimpleNamespace(runs=lambda *kernel: kernel == ("fp8", "native"), gemm_shapes=shapes)


def test_ranks_whose_times_differ_choose_alike(served: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """One is disturbed by a neighbour and leaves no file, or all are: each would go by its own times."""
    caplog.set_level(logging.INFO)
    mine, other = {WIDE: cell(1.0, 0.5), TALL: cell(1.0, 0.5)}, {WIDE: cell(0.5, 1.0)}
    for own, another, first in ((mine, other, False), (other, mine, True)):
        served |= {"own": own, "ranks": [None, another] if first else [another, None]}
        tuning.tune_fp8(runtime(), None, [linear([(96, 64), (64, 96)])], HERE)
        assert served["table"].pick(96, 64, 256) == "cutlass"  # the first rank's
        assert {*served["table"].cells} == {*own}
    assert caplog.messages == ["mixquant: 1 of 2 choices are those of a rank before this one"]


def test_experts_too(served: dict[str, Any]) -> None:
    where = (8, 64, 64, 2, 256)
    served |= {"own": {where: Cell({"64": 1.0}, {})}, "ranks": [{where: Cell({"16": 1.0}, {})}, None]}
    method: Any = SimpleNamespace(
        runs=lambda *kernel: kernel == ("fp8", "native"), sizes=where[:-1], copy_in=lambda precision: None
    )
    tuning.tune_experts(runtime(), None, [method], HERE)
    assert [cell.pick for cell in served["table"].cells.values()] == ["16"]


def test_a_rank_without_such_layers_answers_the_others(served: dict[str, Any]) -> None:
    """A stage of a pipeline may have none, and the others would wait for it."""
    served |= {"own": {}, "ranks": [{WIDE: cell(0.5, 1.0)}, None]}
    tuning.tune_fp8(runtime(), None, [], HERE)
    tuning.tune_experts(runtime(), None, [], HERE)
    assert served["asked"] == 2 and "table" not in served
