"""Servers that are not asked are stopped, with all that they started, and always continued."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from scripts.bench import servers, turns

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]

# Two processes of one group, each of which spins.
SPIN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
print(child.pid, flush=True)
while True: pass
"""


class Arm:
    def __init__(self) -> None:
        self.name = "arm"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        child = psutil.Process(int(self.process.stdout.readline()))
        self.processes = [psutil.Process(self.process.pid), child]

    def stopped(self) -> list[bool]:
        return [process.status() == psutil.STATUS_STOPPED for process in self.processes]

    def spent(self) -> float:
        return sum(process.cpu_times().user for process in self.processes)

    def failed(self, what: str) -> SystemExit:
        return SystemExit(f"{self.name} {what}")

    def end(self) -> None:
        turns._signal(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def arms() -> Iterator[list[Arm]]:
    found = [Arm(), Arm()]
    try:
        yield found
    finally:
        for arm in found:
            arm.end()
            assert arm.process.stdout is not None
            arm.process.stdout.close()


def test_the_others_spend_no_cpu_time(arms: list[Arm]) -> None:
    asked, other = arms
    with turns.alone(asked, arms):
        assert (asked.stopped(), other.stopped()) == ([False, False], [True, True])
        before = other.spent()
        time.sleep(0.1)
        assert other.spent() == before
    assert other.stopped() == [False, False]
    deadline = time.monotonic() + 10
    while other.spent() == before:
        assert time.monotonic() < deadline, "a server that was continued does nothing"
        time.sleep(0.01)


def test_they_go_on_after_an_error(arms: list[Arm]) -> None:
    with pytest.raises(KeyboardInterrupt), turns.alone(arms[0], arms):
        assert arms[1].stopped() == [True, True]
        raise KeyboardInterrupt
    assert arms[1].stopped() == [False, False]


def test_one_that_does_not_stop_ends_the_benchmark(arms: list[Arm], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LIMIT_S", 0.05)
    monkeypatch.setattr(turns, "_awake", lambda group: [group])

    def body() -> NoReturn:
        raise AssertionError("an arm was asked beside another that runs")

    with pytest.raises(SystemExit, match=r"arm did not stop: processes \[\d+\]"), turns.alone(arms[0], arms):
        body()
    assert arms[1].stopped() == [False, False]


# A benchmark that is killed while its server is stopped.
KILLED = f"""
import os, signal, subprocess, sys
sys.path.append({str(ROOT)!r})
from scripts.bench import turns
server = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=turns.die_with_us)
os.kill(server.pid, signal.SIGSTOP)
print(server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_servers_do_not_outlive_a_benchmark_that_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        server = psutil.Process(int(done.stdout))
        while server.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            if time.monotonic() > deadline:
                server.kill()
                raise AssertionError("a stopped server is left behind")
            time.sleep(0.01)


def test_every_server_is_started_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(servers.subprocess, "Popen", lambda command, **how: started.append(how))
    args = argparse.Namespace(flags=[], logs=tmp_path, model=None, model_path=tmp_path, dummy=False, kv_tokens=1)
    servers.Arm("fp8", args, None, timed=False)
    assert servers.ranks([]) == 1 and servers.ranks(["--tp", "2"]) == servers.ranks(["--tp-size=2"]) == 2
    assert started[0]["preexec_fn"] is turns.die_with_us and started[0]["start_new_session"]


def test_under_nohup_a_benchmark_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with servers.serving(argparse.Namespace(arms=[], flags=[], start_limit=1), timed=False):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_running_ones_and_those_of_others_are_left_alone(arms: list[Arm]) -> None:
    with turns.alone(arms[0], [*arms, argparse.Namespace(name="by URL")], turns.RUNNING):
        assert arms[1].stopped() == [False, False]
    arms[1].end()
    with turns.alone(arms[0], [*arms, argparse.Namespace(name="by URL")]):
        pass  # one that has ended is not waited for


def test_watchdogs_wait_for_servers_that_were_stopped() -> None:
    more, environment = turns.patience(["--tp-size", "2"])
    assert more == ["--watchdog-timeout", "86400"] and environment
    assert turns.patience(["--watchdog-timeout=10"])[0] == turns.patience(["--watchdog-timeout", "10"])[0] == []
    parser = argparse.ArgumentParser()
    servers.add_arguments(parser, rounds=1, kv_tokens=1)
    assert parser.parse_args([]).idle == turns.STOPPED
