"""The servers that several modules ask; started once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import plugins
from tests.support.server import ON_GPU, Server
from tests.support.servers import FLAGS, LOW_RECIPE, Servers


@pytest.fixture(scope="session")
def servers(tiny_model: Path, logs: Path) -> Iterator[Servers]:
    shim = plugins.write(logs, "cpu_shim", plugins.CPU_SHIM)
    spy_plugin = plugins.write(logs, "spy", plugins.SPY)
    spy_file = logs / "spy.jsonl"
    mixquant = [*FLAGS, "--quantization", "mixquant"]
    stock_env = {"SGLANG_PLUGINS": "cpu_shim"}
    low_env = {"SPY_FILE": str(spy_file)}
    low_flags = ["--enable-metrics", *(["--mixquant-recipe", LOW_RECIPE] if LOW_RECIPE != "auto" else [])]
    with ExitStack() as running:
        started = [
            Server(tiny_model, logs, "stock", *FLAGS, env=stock_env, pythonpath=[shim]),
            Server(tiny_model, logs, "control", *mixquant, "--mixquant-recipe", "bf16"),
            Server(tiny_model, logs, "low", *mixquant, *low_flags, env=low_env, pythonpath=[spy_plugin]),
        ]
        if ON_GPU:
            flags = [*FLAGS, "--quantization", "w8a8_fp8"]
            started.append(Server(tiny_model, logs, "stock_fp8", *flags, env=stock_env, pythonpath=[shim]))
        for server in started:
            running.callback(server.__exit__)
        for server in started:
            server.wait()
        yield Servers(*started[:3], spy_file, *started[3:])
