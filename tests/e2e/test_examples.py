"""The examples, run as a reader would; on the servers that are up, or, for the engine, with the newer SGLang alone."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.servers import Servers

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *args: str, cwd: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=env, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_one_request_in_bf16(servers: Servers, tmp_path: Path) -> None:
    usual, bf16 = run("one_request_bf16.py", servers.low.url, cwd=tmp_path).splitlines()
    low = servers.low.state()["precision"]["prefill"]
    assert usual.startswith("as usual: ") and f"'{low}': 0" not in usual and f"'{low}'" in usual
    assert bf16.startswith("in BF16: ") and f"'{low}': 0" in bf16


@pytest.mark.skipif(version("sglang").startswith("0.5.17"), reason="an engine takes a start of its own")
def test_offline_engine(tiny_model: Path, tmp_path: Path) -> None:
    said = run("offline_engine.py", str(tiny_model), cwd=tmp_path)
    prefill, decode = said.splitlines()[-2:]
    assert prefill.startswith("prefill: ") and " rows in bf16" in prefill
    assert decode.startswith("decode: ") and decode.endswith(" rows in bf16") and "," not in decode
