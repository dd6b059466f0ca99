"""Real SGLang servers for tests, each started as a user starts one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
import torch

from tests.support.processes import free_port, module

ON_GPU = torch.cuda.is_available()
START_LIMIT_S = 900  # a new environment on a cold disk takes minutes to import
CPU_FLAGS = [
    "--device",
    "cpu",
    "--attention-backend",
    "torch_native",
    "--disable-cuda-graph",
]


def launch(
    args: list[str],
    log: Path,
    *,
    env: dict[str, str] | None = None,
    pythonpath: list[Path] | None = None,
    forked: bool = False,
) -> subprocess.Popen[bytes]:
    """``python -m sglang.launch_server ARGS`` in a process group of its own, output to ``log``; ``forked``: the
    launcher is the fork of a process that has imported SGLang, its children are not."""
    full = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **(env or {})}
    full.pop("MIXQUANT_RECIPE", None)
    full.update({key: value for key, value in (env or {}).items() if key == "MIXQUANT_RECIPE"})
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    full["PYTHONPATH"] = os.pathsep.join([*map(str, pythonpath or []), *inherited])
    start = module("sglang.launch_server") if forked else [sys.executable, "-m", "sglang.launch_server"]
    command = [*start, *args]
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=full, cwd=log.parent, start_new_session=True
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def ends(args: list[str], log: Path, **kwargs: Any) -> tuple[int, str]:
    """Starts a server that must not serve, most often before it has children; its exit status and output."""
    process = launch(args, log, forked=True, **kwargs)
    try:
        status = process.wait(timeout=START_LIMIT_S)
    finally:
        kill(process)
    return status, log.read_text(errors="replace")


class Server:
    """A running server; ``with Server(...) as server``."""

    def __init__(self, model: Path, folder: Path, name: str, *flags: str, **kwargs: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{name}.log"
        args = ["--model-path", str(model), "--port", str(self.port), "--host", "127.0.0.1"]
        # Left to itself, 0.5.17 takes a port that another process may get before it listens there.  Replicas need two.
        args += [] if "--dp-size" in flags else ["--nccl-port", str(free_port())]
        args += ["--max-total-tokens", "20000", *([] if ON_GPU else CPU_FLAGS)]
        args += os.environ.get("TEST_SERVER_FLAGS", "").split()  # by hand: --tp-size 2
        self.process = launch([*args, *flags], self.log, **kwargs)

    def __enter__(self) -> Server:
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        kill(self.process)

    def wait(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            time.sleep(1)
        text = self.log.read_text(errors="replace")
        kill(self.process)
        raise AssertionError(f"the server did not start; end of its log:\n{text[-6000:]}")

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """Whatever it answers; AssertionError with the end of the log where the server is gone."""
        try:
            return requests.request(method, self.url + path, **kwargs)
        except requests.ConnectionError as error:
            if not self.gone():
                raise
            text = self.log.read_text(errors="replace")
            raise AssertionError(f"the server ended before {path}; end of its log:\n{text[-6000:]}") from error

    def gone(self) -> bool:
        """Whether the process ends within seconds: its socket may close first."""
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return False
        return True

    def post(self, path: str, body: dict[str, Any], *, ok: bool = True) -> Any:
        response = self.request("POST", path, json=body, timeout=300)
        if ok:
            assert response.status_code == 200, response.text
            return response.json()
        return response

    def generate(self, ids: list[int] | list[list[int]], tokens: int, **more: Any) -> Any:
        """Greedy, ``tokens`` new ones, whatever the model thinks of stopping."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more.pop("sampling", {})}
        return self.post("/generate", {"input_ids": ids, "sampling_params": params, **more})

    def state(self) -> dict[str, Any]:
        """``internal_states[0].mixquant`` of /server_info."""
        return self.request("GET", "/server_info", timeout=60).json()["internal_states"][0]["mixquant"]

    def flush(self) -> None:
        """Empties the radix cache; SGLang refuses while its last pass is still under way."""
        for _ in range(50):
            if self.request("POST", "/flush_cache", timeout=60).status_code == 200:
                return
            time.sleep(0.2)
        raise AssertionError("the server did not become idle")
