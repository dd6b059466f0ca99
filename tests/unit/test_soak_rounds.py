"""Whole rounds of the soak, on a server in this process that knows the answers, or not quite; and servers that die."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.load.books import CLOSED, GONE, LOST, MALFORMED, RIGHT, WRONG, Books
from scripts.load.client import Client
from scripts.load.problems import draw
from scripts.load.rounds import CALM, CUT, PRESSED, Rounds
from scripts.load.target import Side, Target
from tests.support.soak_server import SoakServer

pytestmark = pytest.mark.once

AGENTS = draw(7, 4, 5)


def soaked(
    spoil: Callable[[int, str], str | None] = lambda _, right: right, kinds: tuple[str, ...] = (CALM,), **more: Any
) -> tuple[Books, list[str]]:
    """Short rounds."""
    from scripts.load.agents import Play

    books, said = Books(), []

    async def play() -> None:
        async with SoakServer(AGENTS, spoil, **more) as server, Client(server.url) as client:
            target = Target(server.url, [Side("server", server.url)], "model")
            rounds = Rounds(Play(client, target, AGENTS, books, 3), said.append)
            await rounds.open()
            for kind in kinds:
                await rounds.round(kind, 0.7)

    asyncio.run(play())
    return books, said


@pytest.mark.slow
def test_a_soak_of_a_right_server_is_clean() -> None:
    books, said = soaked(kinds=(CALM, CUT, PRESSED))
    assert books.problems == [] and books.clean(), said
    assert books.ends[RIGHT] > 50 and books.ends[MALFORMED] > 0 and books.ends[CLOSED] + books.ends[GONE] > 0
    for fault in (
        "abort",
        "session",
        "streaming session",
        "burst",
        "pause with retraction",
        "weight update while paused",
    ):
        assert books.faults[fault] > 0, fault
    assert len(said) == 3 and all("books balance" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "end", "says"),
    [
        (lambda i, right: right[:-1] + ("1" if right[-1] == "0" else "0") if i == 20 else right, WRONG, "is right"),
        (lambda i, right: None if i == 20 else right, LOST, "ServerDisconnectedError"),
    ],
    ids=["wrong", "lost"],
)
def test_one_wrong_or_lost_answer_of_a_soak_is_told(
    spoil: Callable[[int, str], str | None], end: str, says: str
) -> None:
    books, _ = soaked(spoil)
    assert not books.clean() and books.ends[end] == 1 and says in books.problems[0], books.problems


@pytest.mark.slow
@pytest.mark.parametrize("key", [("prefill", "nvfp4"), ("prefill", "bf16"), ("decode", "nvfp4")])
def test_one_row_too_many_in_a_soak_is_told(key: tuple[str, str]) -> None:
    books, said = soaked(miscount={key: 1})
    assert not books.clean() and books.ends[WRONG] == books.ends[LOST] == 0
    assert books.problems and "1 (calm)" in books.problems[0] and "rows" in books.problems[0]
    assert "books balance" not in said[0]


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1] + "::scheduler"])
child.wait()
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("named", "outlives_s", "says"),
    [("sglang", 0, ""), ("sglang", 600, "did not end within"), ("other", 0, "no process that is named as a scheduler")],
)
def test_a_server_must_end_with_its_scheduler(
    named: str, outlives_s: float, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.load import memory, target
    from scripts.serve.processes import Process

    monkeypatch.setattr(target, "DIES_IN_S", 20.0 if not says else 0.5)
    script = tmp_path / "server.py"
    script.write_text(PARENT)
    process = Process("server", [sys.executable, str(script), named, str(outlives_s)], tmp_path / "log")
    try:
        deadline = time.monotonic() + 60
        while len(memory.processes(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.2)  # the child is a copy of its parent until it runs what it was started for
        assert memory.measure(process.pid).host > 2**20
        found = asyncio.run(target.kill_scheduler(process, lambda _: None))
        assert (not found) if not says else says in found
        assert process.running == (named == "other")
    finally:
        process.kill()
    assert memory.measure(process.pid).host == 0
