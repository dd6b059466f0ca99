"""What a test says of a server that is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import requests

from tests.support.processes import free_port
from tests.support.server import Server, kill


def started(log: Path, code: str) -> Server:
    server = Server.__new__(Server)
    server.port = free_port()
    server.url, server.log = f"http://127.0.0.1:{server.port}", log
    with log.open("wb") as out:
        server.process = subprocess.Popen([sys.executable, "-c", code], stdout=out, start_new_session=True)
    return server


def test_a_server_that_ended_is_said_with_the_end_of_its_log(tmp_path: Path) -> None:
    server = started(tmp_path / "log", "print('out of memory, or some such')")
    with pytest.raises(AssertionError, match=r"ended before /flush_cache; .*\nout of memory"):
        server.flush()


def test_one_that_runs_and_does_not_answer_is_another_error(tmp_path: Path) -> None:
    server = started(tmp_path / "log", "import time; time.sleep(60)")
    try:
        with pytest.raises(requests.ConnectionError):
            server.post("/generate", {})
    finally:
        kill(server.process)
