"""Servers as processes: started, waited for, watched and stopped together."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TAIL = 40  # lines


class Ended(RuntimeError):
    """A server ended, or did not come up; the message ends with its log's last lines."""


_given: list[int] = []


def free_port() -> int:
    """Below those that Linux hands out itself: one of these may be somebody's by the time that a server wants it.  Far
    from the others, since a server takes more ports behind its own, a minute before another listens on its."""
    while True:
        port = random.randrange(20000, 32768)
        if any(abs(port - other) < 300 for other in _given):
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            _given.append(port)
            return port


def check_port(host: str, port: int) -> None:
    """Raises ``Ended`` where somebody listens on it already: what they answer would be taken for ours.  Addresses that
    this host has not, as ``::1`` without IPv6, are passed over."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Ended(f"host {host}: {error.strerror}") from None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: not one that just ended
                probe.bind(address)
                probe.listen()
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EPERM):
                raise Ended(f"port {port} of {host} is not free: {error.strerror}; give another one") from None


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Raises ``Ended`` where another process is in here with the same ``lock``."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Ended(what) from None
        yield


class Process:
    """A command in a process group of its own, its output in ``log``."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.name, self.log, self.command = name, log, list(command)
        # Not started from the checkout: its package folder would hide the installed one.
        with log.open("wb") as out:
            self._popen = subprocess.Popen(
                self.command,
                cwd=log.parent,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def ended(self, what: str) -> Ended:
        tail = self.log.read_text(errors="replace").splitlines()[-TAIL:]
        return Ended(f"the {self.name} {what}; last lines of {self.log}:\n" + "\n".join(tail))

    def check(self) -> None:
        """Raises ``Ended`` if it is no longer there."""
        if not self.running:
            raise self.ended(f"ended with status {self._popen.returncode}")

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)

    def kill(self) -> None:
        """At once, with what it started."""
        self.signal(signal.SIGKILL)
        self._popen.wait()

    def wait(self, seconds: float) -> bool:
        """Whether it ended in this time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        return not self.running


def stop(processes: Sequence[Process], patience_s: float = 20) -> None:
    """Asks all of them to end, the last that was started first, and kills those that do not."""
    for process in reversed(processes):
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    for process in processes:
        process.wait(max(0.1, deadline - time.monotonic()))
    for process in processes:
        process.kill()  # also what its group left behind


def answers(url: str) -> bool:
    """Whether a GET of ``url`` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


def wait_for(
    processes: Sequence[Process],
    urls: Sequence[str],
    limit_s: float,
    say: Callable[[str], None],
) -> None:
    """Until each of ``urls`` is answered with 200; raises ``Ended`` if one of ``processes`` ends first, or for time."""
    began = said = time.monotonic()
    waiting = list(urls)
    while waiting:
        for process in processes:
            process.check()
        now = time.monotonic()
        if now - began > limit_s:
            raise processes[-1].ended(f"and those before it were not ready after {limit_s:.0f} s")
        if now - said >= 15:
            said = now
            say(f"  starting, {now - began:.0f} s")
        waiting = [url for url in waiting if not answers(url)]
        if waiting:
            time.sleep(1)
    say(f"  ready after {time.monotonic() - began:.0f} s")
