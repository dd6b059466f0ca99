"""The tests' modules in forks of one process that has imported SGLang: importing takes longer than most of them.

    python -I -S tests/support/forked.py FOLDER PROBED MODULE ARGUMENTS...

runs MODULE as ``python -m`` would, with this process's arguments, environment (``PYTHONPATH`` too), folder and standard
streams, and ends as it ends.  The process that forks listens in FOLDER, is started by the first that asks, and ends
with the process PROBED.  It has what a scheduler imports, with TORCHDYNAMO_DISABLE=1 as all of these modules have it,
and nothing of mixquant_sglang: a fork loads the plugin itself.

A process of its own is run instead, and that is said on standard error, with ``TRITON_INTERPRET``, which Triton reads
when it is imported, and where there is a GPU, after whose first use nothing may fork.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 300
PRELOADED = "sglang.srt.managers.scheduler", "sglang.benchmark.one_batch"


def why_not() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set"
    return "this machine has a GPU" if Path("/dev/nvidiactl").exists() else ""


# -- the process that asks ---------------------------------------------------------------------------------------------


def ask(folder: Path, probed: str, words: list[str]) -> int:
    if reason := why_not():
        print(f"{words[0]}: not forked, {reason}", file=sys.stderr, flush=True)
        code = (
            f"import runpy, sys; sys.path.append({str(ROOT)!r}); runpy.run_module({words[0]!r}, None, '__main__', True)"
        )
        os.execv(sys.executable, [sys.executable, "-W", "ignore", "-c", code, *words[1:]])
    asked = json.dumps({"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
    with _connected(folder, probed) as parent:
        socket.send_fds(parent, [len(asked).to_bytes(8, "big")], [0, 1, 2])
        parent.sendall(asked)
        said = parent.recv(8)
    if not said:
        print("the process that forks has ended", file=sys.stderr)
        return 1
    status = int.from_bytes(said, "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _connected(folder: Path, probed: str) -> socket.socket:
    address = folder / "socket"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (found := _connect(address)) is not None:
            return found
        log = folder / "log"
        with log.open("w") as out:
            command = [sys.executable, "-W", "ignore", __file__, "--parent", str(address), probed]
            parent = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        for _ in range(START_LIMIT_S * 20):
            if (found := _connect(address)) is not None:
                return found
            if parent.poll() is not None:
                break
            time.sleep(0.05)
    raise SystemExit(f"the process that forks did not start: {log.read_text()[-3000:]}")


def _connect(address: Path) -> socket.socket | None:
    found = socket.socket(socket.AF_UNIX)
    try:
        found.connect(str(address))
    except OSError:
        found.close()
        return None
    return found


# -- the process that forks --------------------------------------------------------------------------------------------


class Parent:
    def __init__(self, address: str, probed: int) -> None:
        self.probed = probed
        self.asked: dict[int, socket.socket] = {}  # by process
        self.selector = selectors.DefaultSelector()
        self.listening = socket.socket(socket.AF_UNIX)
        Path(address).unlink(missing_ok=True)
        self.listening.bind(address)
        self.listening.listen(16)
        self.selector.register(self.listening, selectors.EVENT_READ)

    def serve(self) -> None:
        """Until the process ``probed`` has ended."""
        while _lives(self.probed):
            for key, _ in self.selector.select(0.1):
                if key.fileobj is self.listening:
                    self._fork(self.listening.accept()[0])
                else:
                    os.kill(key.data, signal.SIGKILL)  # who asked has gone
                    self.selector.unregister(key.fileobj)
            self._bury()
        for process in self.asked:
            os.kill(process, signal.SIGKILL)

    def _fork(self, connection: socket.socket) -> None:
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        wanted, said = int.from_bytes(length, "big"), b""
        while len(said) < wanted and (part := connection.recv(wanted - len(said))):
            said += part
        if len(streams) != 3 or not wanted or len(said) < wanted:
            connection.close()
            return
        process = os.fork()
        if process == 0:
            self.listening.close()
            for other in (connection, *self.asked.values()):
                other.close()
            _become(json.loads(said), list(streams))
        for stream in streams:
            os.close(stream)
        self.asked[process] = connection
        self.selector.register(connection, selectors.EVENT_READ, process)

    def _bury(self) -> None:
        for process, connection in list(self.asked.items()):
            ended, status = os.waitpid(process, os.WNOHANG)
            if not ended:
                continue
            with contextlib.suppress(KeyError):
                self.selector.unregister(connection)
            with contextlib.suppress(OSError), connection:
                connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
            del self.asked[process]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    """The process that was asked for; does not return."""
    import atexit
    import random
    import runpy
    import traceback

    status = 1
    try:
        for to, stream in enumerate(streams):
            os.dup2(stream, to)
            os.close(stream)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        random.seed()
        sys.argv = ["-c", *asked["words"][1:]]
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [folder for folder in given if folder and folder not in sys.path]
        sys.path.append(str(ROOT))
        runpy.run_module(asked["words"][0], None, "__main__", True)
        status = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main() -> int:
    if sys.argv[1] != "--parent":
        return ask(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    import importlib

    if sys.path[0] == str(Path(__file__).parent):
        del sys.path[0]
    for name in PRELOADED:
        importlib.import_module(name)
    assert not any(name.partition(".")[0] == "mixquant_sglang" for name in sys.modules)
    Parent(sys.argv[2], int(sys.argv[3])).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
