"""The package's rooms import one way, no module is in a cycle, and no file is too long to be read at once."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import mixquant_sglang
from scripts.tools import rooms
from scripts.tools.rooms import ROOMS

NAME = "mixquant_sglang"
OUTSIDE = {"__init__", "__main__"}


def modules() -> dict[str, Path]:
    """Of the package that is tested."""
    return rooms.modules(Path(mixquant_sglang.__file__).parent)


def graph() -> dict[str, set[str]]:
    return rooms.graph(modules())


def backwards(edges: dict[str, set[str]]) -> list[str]:
    place = {room: i for i, room in enumerate(ROOMS)}
    wrong = []
    for name, targets in edges.items():
        room = name.partition(".")[0]
        if room in OUTSIDE:
            continue
        wrong += [f"{name} -> {t}" for t in sorted(targets) if place[t.partition(".")[0]] > place[room]]
    return wrong


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """A cycle of modules, if there is one."""
    done: set[str] = set()
    path: list[str] = []

    def walk(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        for target in sorted(edges[name]):
            if found := walk(target):
                return found
        path.pop()
        done.add(name)
        return []

    return next((found for name in edges if (found := walk(name))), [])


def test_every_module_is_in_a_room() -> None:
    assert {name.partition(".")[0] for name in modules()} - OUTSIDE == {*ROOMS, "configs"} & {
        *(name.partition(".")[0] for name in modules())
    }


def test_rooms_import_one_way() -> None:
    assert backwards(graph()) == []


def test_no_module_is_in_a_cycle() -> None:
    assert cycle(graph()) == []


def test_the_checks_see_what_they_look_for() -> None:
    assert backwards({"formats.fp8": {"layers.linear"}}) == ["formats.fp8 -> layers.linear"]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    edges = graph()
    assert "kernels.registry" in edges["layers.packed"]
    assert "versions.loading" in edges["layers.packed"]
    assert len(edges) > 80


def test_files_can_be_read_at_once() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    assert statistics.median(lengths.values()) < 150


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        ((NAME,), ("torch", "sglang")),
        ((f"{NAME}.recipe.matching", f"{NAME}.recipe.fingerprint", f"{NAME}.recipe.policy"), ("torch", "sglang")),
        ((f"{NAME}.passes.limits", f"{NAME}.kernels.limits", f"{NAME}.tools.plan.command"), ("torch", "sglang")),
        ((f"{NAME}.passes.graphs", f"{NAME}.weights.refresh", f"{NAME}.weights.ready_made"), ("sglang",)),
        ((f"{NAME}.host.runtime", f"{NAME}.host.metrics"), ("sglang",)),
    ],
)
def test_what_is_cheap_to_import(names: tuple[str, ...], absent: tuple[str, ...]) -> None:
    code = f"import sys, {', '.join(names)}; assert not {{*{absent!r}}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("room", ["recipe", "formats", "kernels", "passes", "weights"])
def test_rooms_below_versions_know_nothing_of_sglang(room: str) -> None:
    files = {name: file for name, file in modules().items() if name.partition(".")[0] == room}
    assert files
    for name, file in files.items():
        assert not any(target.partition(".")[0] == "sglang" for target in rooms.imported(file)), name


def test_the_picture_is_that_of_the_imports() -> None:
    assert rooms.draw() == rooms.OUT.read_text(), "scripts/draw_rooms draws it anew"
