"""What a soak plays against: one server, a pair, or servers that somebody else started."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from scripts.load import memory
from scripts.load.books import Counted
from scripts.load.client import Client
from scripts.load.memory import Memory
from scripts.serve.pair import CPU_FLAGS, Pair, Plan
from scripts.serve.processes import Ended, Process, free_port, stop, wait_for

# /health runs a pass of a token otherwise, and the counters are held against the requests that were made.
QUIET = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0", "PYTHONWARNINGS": "ignore"}
QUIET["MIXQUANT_MIN_TOKENS"] = "1"  # the books count rows of every prompt, however short, in the recipe's precision
# On a CPU torch keeps a kernel of oneDNN for each number of rows that it multiplied, 1024 of them in each of two
# caches, a quarter to half a MiB each: memory that fills for an hour and is no leak.  Bounded, they are soon full.
ON_CPU = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# Small on purpose: prompts come in chunks, decode rows in mixed passes, and what does not fit waits.
BOTH = ("--enable-cache-report", "--enable-metrics", "--random-seed", "1", "--chunked-prefill-size", "256")
RUNNING, QUEUED, POOL = 8, 8, 5000
SINGLE = (
    "--enable-mixed-chunk",
    "--enable-streaming-session",
    *("--max-running-requests", str(RUNNING), "--max-queued-requests", str(QUEUED), "--max-total-tokens", str(POOL)),
)
DIES_IN_S = 60.0  # a server after its scheduler
IDLE_IN_S = 120.0


@dataclass(frozen=True)
class Side:
    """One server.  ``name``: "server", "prefill" or "decode"."""

    name: str
    url: str
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES has them


class Target:
    """``sides``: the servers; ``url``: where requests go; ``pair``: whether the sides are the halves of one."""

    pair = False
    bounded = False  # whether its queue is as short as QUEUED says

    def __init__(self, url: str, sides: Sequence[Side], model: str) -> None:
        self.url, self.sides, self.model = url, list(sides), model

    @property
    def can_kill(self) -> bool:
        return False

    def pid(self, side: Side) -> int | None:
        return memory.listener(int(side.url.rpartition(":")[2].split("/")[0]))

    def measure(self) -> dict[str, Memory]:
        """By side; without those whose processes cannot be seen."""
        found = {}
        for side in self.sides:
            pid = self.pid(side)
            if pid is not None:
                found[side.name] = memory.measure(pid, side.gpus)
        return found

    async def kill_and_restart(self, name: str, say: Callable[[str], None]) -> str:
        """What does not hold of it, "" where all does.  Only where it ``can_kill``."""
        return f"the {name} server is not this one's to kill"

    def check(self) -> None:
        """Raises ``Ended`` where a server is gone that nobody killed."""

    def stop(self) -> None:
        """Ends what this started."""


class OneServer(Target):
    bounded = True

    def __init__(self, model: str, recipe: str, flags: Sequence[str], gpus: tuple[str, ...], logs: Path) -> None:
        self.port = free_port()
        super().__init__(f"http://127.0.0.1:{self.port}", [], model)
        self.sides = [Side("server", self.url, gpus)]
        self.command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(self.port)]
        self.command += ["--quantization", "mixquant", "--nccl-port", str(free_port())]
        self.command += ["--mixquant-recipe", recipe] if recipe else []
        self.command += [*([] if gpus else CPU_FLAGS), *BOTH, *SINGLE, *flags]
        self.env = QUIET if gpus else QUIET | ON_CPU
        self.logs, self.lives = logs, 0
        self.process: Process | None = None

    def start(self, say: Callable[[str], None]) -> None:
        self.lives += 1
        log = self.logs / f"soak-server-{self.lives}.log"
        say(f"{' '.join(['python', *self.command[1:]])}\n  log: {log}")
        self.process = Process("server", self.command, log, self.env)
        wait_for([self.process], [self.url + "/health"], 900, say)

    @property
    def can_kill(self) -> bool:
        return True

    def pid(self, side: Side) -> int | None:
        assert self.process
        return self.process.pid

    async def kill_and_restart(self, name: str, say: Callable[[str], None]) -> str:
        assert self.process
        wrong = await kill_scheduler(self.process, say)
        await asyncio.to_thread(self.start, say)
        return wrong

    def check(self) -> None:
        if self.process:
            self.process.check()

    def stop(self) -> None:
        if self.process:
            stop([self.process])


class PairTarget(Target):
    pair = True

    def __init__(self, pair: Pair, plan: Plan, gpus: dict[str, tuple[str, ...]]) -> None:
        super().__init__(plan.url("router"), [], plan.model)
        self.sides = [Side(name, plan.url(name), gpus[name]) for name in ("prefill", "decode")]
        self.running = pair
        self.lives = 0

    @property
    def can_kill(self) -> bool:
        return True

    def pid(self, side: Side) -> int | None:
        return self.running.processes[side.name].pid

    async def kill_and_restart(self, name: str, say: Callable[[str], None]) -> str:
        wrong = await kill_scheduler(self.running.processes[name], say)
        self.lives += 1
        log = self.running.processes[name].log
        log.rename(log.with_suffix(f".{self.lives}.log"))
        await asyncio.to_thread(self.running.start, name)
        await asyncio.to_thread(self.running.wait, name)
        return wrong

    def check(self) -> None:
        for process in self.running.processes.values():
            process.check()

    def stop(self) -> None:
        self.running.stop()


async def kill_scheduler(process: Process, say: Callable[[str], None]) -> str:
    """SIGKILL to the schedulers of a server, which must then end by itself; what does not hold."""
    found = memory.schedulers(process.pid)
    if not found:
        return f"the {process.name} has no process that is named as a scheduler"
    for scheduler in found:
        try:
            scheduler.kill()
        except psutil.NoSuchProcess:
            continue
    began = time.monotonic()
    ended = await asyncio.to_thread(process.wait, DIES_IN_S)
    say(f"  the scheduler of the {process.name} was killed; the server ended {time.monotonic() - began:.1f} s later")
    process.kill()  # what its group left behind
    return "" if ended else f"the {process.name} did not end within {DIES_IN_S:.0f} s after its scheduler"


async def state(client: Client, side: Side) -> dict[str, Any]:
    """``internal_states[i].mixquant`` of /server_info, of all replicas together."""
    status, text = await client.get(side.url + "/server_info")
    if status != 200:
        raise Ended(f"/server_info of the {side.name} server: {status} {text[:300]}")
    found = [state.get("mixquant") for state in json.loads(text)["internal_states"]]
    if not all(found):
        raise Ended(f"the {side.name} server at {side.url} runs without mixquant")
    return together(found)


def together(replicas: list[dict[str, Any]]) -> dict[str, Any]:
    """What they counted in all; the rest is that of the first."""
    tokens: dict[str, Counter[str]] = {phase: Counter() for phase in replicas[0]["tokens"]}
    for replica in replicas:
        for phase, by in replica["tokens"].items():
            tokens[phase].update(by)
    protected = sum(replica["protected_rows"] for replica in replicas)
    return {**replicas[0], "tokens": {phase: dict(by) for phase, by in tokens.items()}, "protected_rows": protected}


def counted(told: dict[str, Any]) -> Counted:
    tokens = {(phase, precision): n for phase, by in told["tokens"].items() for precision, n in by.items()}
    return Counted(tokens, told["protected_rows"])


_SERIES = re.compile(r"^([a-z_:]+)\{([^}]*)\} (\S+)$", re.MULTILINE)


def metrics(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Series of a /metrics page: labels and value, by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in _SERIES.findall(text):
        pairs = dict(re.findall(r'([a-z_]+)="([^"]*)"', labels))
        found.setdefault(name, []).append((pairs, float(value)))
    return found


def differs(told: dict[str, Any], page: dict[str, list[tuple[dict[str, str], float]]]) -> list[str]:
    """Where /metrics does not say what /server_info says, of rank 0 of each replica."""
    wrong = []
    series: dict[tuple[str, str], float] = {}
    for labels, value in page.get("mixquant:forward_tokens_total", []):
        if labels.get("tp_rank", "0") == "0":
            key = labels["phase"], labels["precision"]
            series[key] = series.get(key, 0) + value
    for key, n in counted(told).tokens.items():
        if series.get(key, 0) != n:
            wrong.append(f"/metrics has {series.get(key, 0):.0f} {' '.join(key)} rows, /server_info {n}")
    protected = sum(
        value for labels, value in page.get("mixquant:protected_rows_total", []) if labels.get("tp_rank", "0") == "0"
    )
    if protected != told["protected_rows"]:
        wrong.append(f"/metrics has {protected:.0f} protected rows, /server_info {told['protected_rows']}")
    return wrong


def value_of(page: dict[str, list[tuple[dict[str, str], float]]], name: str) -> float:
    return sum(value for _, value in page.get(name, []))


async def idle(client: Client, side: Side) -> str:
    """Empties the cache, which SGLang refuses while anything runs or waits; what does not hold."""
    deadline = time.monotonic() + IDLE_IN_S
    while True:
        status, text = await client.post(side.url + "/flush_cache")
        if status == 200:
            return ""
        if time.monotonic() > deadline:
            return f"the {side.name} server did not become idle in {IDLE_IN_S:.0f} s: {status} {text[:200]}"
        await asyncio.sleep(0.3)
