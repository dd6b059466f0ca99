"""Memory of servers: what their processes hold of the host, and of their GPU."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import psutil

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes.  ``host``: resident set of a server's process and all below it, shared pages counted in each; ``gpu``:
    held on its GPUs, as the driver says, None without one: by those processes where the driver tells them apart, by
    anybody (``gpu_shared``) where it does not, as in most containers."""

    host: int
    gpu: int | None = None
    gpu_shared: bool = False

    def __str__(self) -> str:
        whose = " (all processes)" if self.gpu_shared else ""
        gpu = "" if self.gpu is None else f" + GPU {self.gpu / MIB:.1f}{whose}"
        return f"{self.host / MIB:.1f}{gpu} MiB"

    def growth(self, before: Memory) -> dict[str, float]:
        """Percent, by kind; infinite where the GPU's was told of other processes before."""
        found = {"host": 100 * (self.host / before.host - 1)}
        if self.gpu is not None and before.gpu:
            found["gpu"] = 100 * (self.gpu / before.gpu - 1) if self.gpu_shared == before.gpu_shared else math.inf
        return found


def processes(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def schedulers(pid: int) -> list[psutil.Process]:
    """SGLang names its processes."""
    found = []
    for process in processes(pid):
        try:
            names = f"{process.name()} {' '.join(process.cmdline())}"
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "sglang::scheduler" in names:
            found.append(process)
    return found


def listener(port: int) -> int | None:
    """The process that listens on a port of this host, if it may be seen."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            pid: int | None = connection.pid
            return pid
    return None


def gpu_held(gpus: Sequence[str], pids: Collection[int]) -> tuple[int | None, bool]:
    """Bytes on these GPUs, numbers or UUIDs, and whether they are everybody's; asked of the driver, so that this
    process takes no CUDA context.  Where the driver names none of ``pids`` on one of them, it counts the processes of
    another namespace, and what all hold is taken for all GPUs."""
    if not gpus:
        return None, False
    import pynvml

    pynvml.nvmlInit()
    own, everybody, apart = 0, 0, True
    for gpu in gpus:
        by_number = gpu.isdigit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(gpu)
        everybody += int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        held = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid in pids]
        apart = apart and bool(held) and None not in held
        own += sum(int(used or 0) for used in held)
    return (own, False) if apart else (everybody, True)


def measure(pid: int, gpus: Sequence[str] = ()) -> Memory:
    host, pids = 0, set()
    for process in processes(pid):
        pids.add(process.pid)
        try:
            host += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return Memory(host, *gpu_held(gpus, pids))
