"""Modules of the tests in processes of their own, which import the installed package and not the checkout's, and ports
for them."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORKED = Path(__file__).with_name("forked.py")


def module(name: str, *args: str | Path) -> list[str]:
    """The command that runs the tests' module ``name``, the checkout being the last place to import from."""
    return [sys.executable, "-I", "-S", str(FORKED), _folder(), str(os.getpid()), name, *map(str, args)]


@cache
def _folder() -> str:
    """Of the process that forks; short, since the address of a socket is."""
    made = tempfile.mkdtemp(prefix="forked-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


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
