"""Ranks that come to different recipes do not start: two processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.ranks import check_same
from mixquant_sglang.recipe.fingerprint import fingerprint
from mixquant_sglang.recipe.select import Device, select
from tests.support.processes import importable_when_spawned


def rank_of(rank: int, recipes: tuple[str, ...], folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(recipes))
    asked = recipe.load(recipes[rank])
    selection = select(asked, Device("a GPU", (9, 0)))
    try:
        check_same(fingerprint(asked, selection), f"recipe {asked.name}", dist.group.WORLD)
        said = ""
    except MixQuantError as error:
        said = str(error)
    (folder / str(rank)).write_text(said)
    dist.destroy_process_group()


def answers(recipes: tuple[str, ...], folder: Path) -> list[str]:
    with importable_when_spawned():
        mp.spawn(rank_of, (recipes, folder), nprocs=len(recipes), join=True)
    return [(folder / str(rank)).read_text() for rank in range(len(recipes))]


@pytest.mark.slow
def test_a_difference_is_named_on_every_rank(tmp_path: Path) -> None:
    first, second = answers(("fp8", "nvfp4"), tmp_path)
    assert first == second and "\n" not in first
    assert "rank 0: recipe fp8 (" in first and "rank 1: recipe nvfp4 (" in first
    assert "give every node the same recipe" in first


@pytest.mark.slow
def test_the_same_numbers_under_another_name_are_no_difference(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text(recipe.shipped()["fp8"].read_text())
    assert answers(("fp8", str(copy)), tmp_path) == ["", ""]


def test_one_rank_has_nobody_to_differ_from() -> None:
    check_same("0", "alone", None)
