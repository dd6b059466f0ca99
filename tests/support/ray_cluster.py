"""A Ray cluster of one node for tests, on this machine's loopback, in processes of its own; needs ``ray``.

A cluster that runs before the server does: its actors inherit the cluster's environment and none of the server's.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HEAD = """
import sys

import ray

ray.init(
    num_cpus=2,
    num_gpus=int(sys.argv[1]),
    include_dashboard=False,
    object_store_memory=128 * 2**20,
    _node_ip_address="127.0.0.1",
    _temp_dir=sys.argv[2],
)
print("address", ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""

# A CPU has no GPU that SGLang's actor could choose, and SGLang chooses one whatever --device says.
SHIM = """
def register():
    import torch

    if not torch.cuda.is_available():
        torch.cuda.set_device = lambda _device: None
"""


@contextmanager
def cluster(gpus: int, log: Path, pythonpath: str) -> Iterator[dict[str, str]]:
    """The environment of a server that is to use it.  ``gpus``: how many it has to give, which nobody checks."""
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MIXQUANT_", "SGLANG_", "RAY_"))}
    own = {**clean, **told, "PYTHONPATH": pythonpath, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, log.open("wb") as errors:
        head = subprocess.Popen(
            [sys.executable, "-c", HEAD, str(gpus), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=own,
            cwd=folder,
            start_new_session=True,
            text=True,
        )
        assert head.stdin is not None and head.stdout is not None
        try:
            said = (line.split() for line in iter(head.stdout.readline, ""))
            address = next((words[1] for words in said if words[:1] == ["address"]), "")
            assert address, log.read_text(errors="replace")[-3000:]
            yield {**told, "RAY_ADDRESS": address}
        finally:
            with suppress(OSError, subprocess.TimeoutExpired):
                head.stdin.close()
                head.wait(timeout=30)
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait(timeout=30)
            head.stdout.close()
