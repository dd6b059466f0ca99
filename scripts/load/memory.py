"""Memory of servers: what their processes hold of the host, and of their GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes.  ``host``: resident set of a server's process and all below it, shared pages counted in each; ``gpu``:
    used on its GPUs by anybody, as the driver says, None without one."""

    host: int
    gpu: int | None = None

    def __str__(self) -> str:
        gpu = "" if self.gpu is None else f" + GPU {self.gpu / MIB:.1f}"
        return f"{self.host / MIB:.1f}{gpu} MiB"

    def growth(self, before: Memory) -> dict[str, float]:
        """Percent, by kind."""
        found = {"host": 100 * (self.host / before.host - 1)}
        if self.gpu is not None and before.gpu:
            found["gpu"] = 100 * (self.gpu / before.gpu - 1)
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


def gpu_used(gpus: Sequence[str]) -> int | None:
    """Bytes used on these GPUs, numbers or UUIDs, asked of the driver so that this process takes no CUDA context."""
    if not gpus:
        return None
    import pynvml

    pynvml.nvmlInit()
    used = 0
    for gpu in gpus:
        by_number = gpu.isdigit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(gpu)
        used += int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    return used


def measure(pid: int, gpus: Sequence[str] = ()) -> Memory:
    host = 0
    for process in processes(pid):
        try:
            host += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return Memory(host, gpu_used(gpus))
