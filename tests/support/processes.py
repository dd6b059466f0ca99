"""Modules of the tests in processes of their own, which import the installed package and not the checkout's, and ports
for them."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def module(name: str, *args: str | Path) -> list[str]:
    """The command that runs the tests' module ``name``, the checkout being the last place to import from."""
    code = f"import runpy, sys; sys.path.append({str(ROOT)!r}); runpy.run_module({name!r}, None, '__main__', True)"
    return [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]


def free_port() -> int:
    """Below those that Linux hands out itself: one of these may be somebody's by the time that a process wants it."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


@contextmanager
def importable_when_spawned() -> Iterator[None]:
    """``multiprocessing`` hands ``sys.path`` on to the processes that it spawns, which import the tests' functions."""
    sys.path.append(str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))
