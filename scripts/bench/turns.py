"""Servers whose turn it is not are stopped.

An idle SGLang server asks for requests in a loop that never sleeps: one core for each, and more with several ranks.
Next to such neighbours the launches of a short pass take longer, by other amounts in each round.  So all processes of
the other arms are stopped (SIGSTOP) while one is asked, and continued (SIGCONT) behind it, whatever happened.  What
they hold stays: memory, KV cache, connections.  Where the benchmark is killed and can continue nobody, its servers are
killed too (``die_with_us``): stopped ones would keep their memory, and hear no SIGTERM.

SGLang's watchdog counts time in which a batch makes no progress, and NCCL's the heartbeats of its own thread.  Both
count the time that they were stopped, so ``patience`` has servers wait longer than any benchmark takes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

STOPPED, RUNNING = "stopped", "running"
LIMIT_S = 10.0  # for all processes of a server to stop
_PATIENCE_S = 86400
_WATCHDOG = "--watchdog-timeout"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--idle",
        choices=(STOPPED, RUNNING),
        default=STOPPED,
        help="what servers are while another one is asked; running ones spin on the CPU (default: %(default)s)",
    )


def patience(flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of a server of ``flags`` that may be stopped for as long as others are asked."""
    given = any(flag.partition("=")[0] == _WATCHDOG for flag in flags)
    more = [] if given else [_WATCHDOG, str(_PATIENCE_S)]
    return more, {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(_PATIENCE_S)}


def die_with_us() -> None:
    """``preexec_fn`` of a server, which is then killed when the thread that starts it ends, stopped or not; SGLang's
    launcher has its own processes end with it in the same way.  Start servers in the main thread."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def alone(arm: object, arms: Sequence[Any], idle: str = STOPPED) -> Iterator[None]:
    """While ``arm`` is asked, those of ``arms`` that we started and that are not it are stopped, if ``idle`` says so.

    Ends the benchmark where one does not stop."""
    others = [other for other in arms if other is not arm and hasattr(other, "process")] if idle == STOPPED else []
    try:
        for other in others:
            _signal(other.process.pid, signal.SIGSTOP)
        for other in others:
            _wait(other)
        yield
    finally:
        for other in others:
            _signal(other.process.pid, signal.SIGCONT)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait(arm: Any) -> None:
    """Until all processes of its group are stopped: each thread stops when it next leaves the kernel."""
    deadline = time.monotonic() + LIMIT_S
    while awake := _awake(arm.process.pid):
        if time.monotonic() > deadline:
            raise arm.failed(f"did not stop: processes {awake}")
        time.sleep(0.001)


def _awake(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            ended = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            if os.getpgid(process.pid) == group and process.status() not in ended:
                found.append(process.pid)
    return found
