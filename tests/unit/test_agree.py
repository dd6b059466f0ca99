"""Ranks of a tensor parallel group decide alike: two processes, of which one found something."""

from __future__ import annotations

import multiprocessing
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import importable_when_spawned


def _rank(rank: int, store: str, found: Any) -> None:
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = types.SimpleNamespace(world_size=2, cpu_group=torch.distributed.group.WORLD)
    for name in ("sglang", "sglang.srt", "sglang.srt.distributed"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["sglang.srt.distributed"].get_tp_group = lambda: group  # type: ignore[attr-defined]
    from mixquant_sglang.versions.groups import agree

    problems = ["a is NaN" if rank else None, None, f"from rank {rank}"]
    found.put((rank, [agree(problem) for problem in problems]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    ranks = [spawn.Process(target=_rank, args=(rank, str(tmp_path / "store"), found)) for rank in (0, 1)]
    with importable_when_spawned():
        for process in ranks:
            process.start()
    answers = dict(found.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    assert answers[0] == answers[1] == ["a is NaN", None, "from rank 0"]
