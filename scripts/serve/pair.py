"""A prefill server, a decode server and SGLang's router, as one thing to start and to stop."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from scripts.serve.libraries import mooncake_environment
from scripts.serve.processes import Ended, Process, alone, check_port, free_port, stop, wait_for

_CPU = "--device cpu --attention-backend torch_native --disable-cuda-graph --max-total-tokens 20000 --sleep-on-idle"
CPU_FLAGS = tuple(_CPU.split())
# Where SGLang's prefill server records CUDA events, whatever it runs on: before a chunk behind cached tokens, and, in
# 0.5.23, while it copies the numbers of pages to the host, unless all ranks of context parallelism (the one) send.
CPU_ENV = {
    "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
    "SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER": "1",
}
# sglang-router's mini_lb hands bodies on as they are; its router in Rust (0.3.2) drops custom_params, and with them a
# request's BF16 prefill.
ROUTERS = ("mini", "rust")


@dataclass(frozen=True)
class Plan:
    """``recipe`` "" is the default one; ``decode``: "mixquant" or "stock".  GPUs as CUDA_VISIBLE_DEVICES has them,
    "" for none.  ``transfer``: SGLang's --disaggregation-transfer-backend."""

    model: str
    port: int
    recipe: str = ""
    decode: str = "mixquant"
    prefill_gpu: str = ""
    decode_gpu: str = ""
    tp: int = 1
    transfer: str = "nixl"
    router: str = "mini"
    host: str = "127.0.0.1"
    both: tuple[str, ...] = ()
    prefill_flags: tuple[str, ...] = ()
    decode_flags: tuple[str, ...] = ()
    limit_s: float = 900
    ports: dict[str, int] = field(default_factory=dict)
    envs: dict[str, dict[str, str]] = field(default_factory=dict)  # "prefill", "decode" -> more environment

    def port_of(self, name: str) -> int:
        if name not in self.ports:
            self.ports[name] = free_port()
        return self.ports[name]

    def url(self, name: str) -> str:
        """Of the prefill server, the decode server or the router."""
        port = self.port if name == "router" else self.port_of(name)
        return f"http://{'127.0.0.1' if self.host in ('0.0.0.0', '::') else self.host}:{port}"

    def server(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Command and environment of the server ``name``, "prefill" or "decode"."""
        gpus = self.prefill_gpu if name == "prefill" else self.decode_gpu
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model]
        command += ["--host", self.host, "--port", str(self.port_of(name)), "--tp-size", str(self.tp)]
        command += ["--nccl-port", str(self.port_of(f"{name} nccl"))]
        command += ["--disaggregation-mode", name, "--disaggregation-transfer-backend", self.transfer]
        command += ["--disaggregation-bootstrap-port", str(self.port_of("bootstrap"))]
        command += ["--enable-cache-report", "--enable-metrics", *(() if gpus else CPU_FLAGS)]
        env = mooncake_environment() if self.transfer.startswith("mooncake") else {}
        env |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": gpus} | ({} if gpus else CPU_ENV)
        if name == "decode":
            command.append("--disaggregation-decode-enable-radix-cache")
        if name == "prefill" or self.decode == "mixquant":
            command += ["--quantization", "mixquant"]
            command += ["--mixquant-recipe", self.recipe] if self.recipe else []
        elif gpus:
            env["SGLANG_PLUGINS"] = "none"
        command += [*self.both, *(self.prefill_flags if name == "prefill" else self.decode_flags)]
        return command, env | self.envs.get(name, {})

    def router_command(self) -> list[str]:
        command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
        command += ["--prefill", self.url("prefill"), str(self.port_of("bootstrap")), "--decode", self.url("decode")]
        command += ["--host", self.host, "--port", str(self.port)]
        if self.router == "mini":
            return [*command, "--mini-lb"]
        return [*command, "--prometheus-port", str(self.port_of("router metrics"))]


class Pair:
    """``with Pair(plan, logs) as pair``: ready when it begins, stopped when it ends.  Raises ``Ended``."""

    def __init__(self, plan: Plan, logs: Path, say: Callable[[str], None] = print) -> None:
        self.plan, self.logs, self.say = plan, logs, say
        self.processes: dict[str, Process] = {}
        self._alone = ExitStack()

    @property
    def url(self) -> str:
        return self.plan.url("router")

    def start(self, name: str) -> Process:
        """Starts ``name`` ("prefill", "decode" or "router"), and does not wait for it."""
        command, env = (self.plan.router_command(), {}) if name == "router" else self.plan.server(name)
        title = name if name == "router" else f"{name} server"
        log = self.logs / f"{name}-{self.plan.port}.log"
        self.say(f"{' '.join(['python', *command[1:]])}\n  log: {log}")
        self.processes[name] = Process(title, command, log, env)
        return self.processes[name]

    def wait(self, *names: str) -> None:
        urls = [self.plan.url(name) + "/health" for name in names]
        wait_for(list(self.processes.values()), urls, self.plan.limit_s, self.say)

    def __enter__(self) -> Pair:
        plan, port = self.plan, self.plan.port
        for fixed in (port, *plan.ports.values()):
            check_port(plan.host, fixed)
        lock = self.logs / f"pair-{port}.lock"
        self._alone.enter_context(alone(lock, f"another pair starts or runs with port {port}; give another one"))
        try:
            self.start("prefill")
            self.start("decode")
            self.wait("prefill", "decode")
            self.check()
            check_port(plan.host, port)  # nobody else took it while these two loaded
            self.start("router")
            self.wait("router")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _t: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        stop(list(self.processes.values()))
        self._alone.close()

    def check(self) -> None:
        """One token through both: what does not fit is known before anybody is served."""
        body = {"input_ids": [1, 2, 3, 4], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        status, text = self.ask("/generate", body)
        if status != 200:
            raise Ended(f"the prefill and the decode server do not work together: {text[:2000]}")

    def ask(self, path: str, body: dict[str, Any], timeout: float = 600) -> tuple[int, str]:
        """``body`` sent to both as a router does; the decode server's answer."""
        host = self.plan.url("prefill").partition("//")[2].rpartition(":")[0]
        room = {"bootstrap_host": host, "bootstrap_port": self.plan.port_of("bootstrap")}
        body = {**body, **room, "bootstrap_room": random.getrandbits(62)}
        first = threading.Thread(target=post, args=(self.plan.url("prefill") + path, body, timeout), daemon=True)
        first.start()
        return post(self.plan.url("decode") + path, body, timeout)


def post(url: str, body: dict[str, Any], timeout: float) -> tuple[int, str]:
    """Status and text of the answer; 0 and the error where there is none."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return int(answer.status), answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


def gpus_of(first: int, count: int) -> str:
    """CUDA_VISIBLE_DEVICES of ``count`` GPUs from the ``first`` of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(first + count)]
    return ",".join(names[first : first + count])


def states(servers: Sequence[str]) -> list[dict[str, Any]]:
    """``internal_states[0].mixquant`` of each server's /server_info; empty for a stock one."""
    found = []
    for url in servers:
        with urllib.request.urlopen(f"{url}/server_info", timeout=60) as answer:
            found.append(json.load(answer)["internal_states"][0].get("mixquant") or {})
    return found
