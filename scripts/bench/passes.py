"""The benchmarks' own SGLang plugin: how long the model's prefill passes take, as the server's stream sees them.

No HTTP, no scheduling: CUDA events around ``ModelRunner.forward`` on its current stream (wall time on a CPU).  A pass
that is bound by launching kernels counts with its launches.  Each pass appends a line to the file that the environment
variable names: forward mode, rows, milliseconds.  A thread of its own waits for the end event (asleep, not spinning)
and writes, so the scheduler is never synchronised; decode passes are left alone, so decode times are unchanged.

servers.py copies this file as ``bench_passes`` into a folder of its own with an entry point, and puts that on a
server's PYTHONPATH.  There it stands before the installed plugins, so that its hook is inside of mixquant's.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLUGIN = "bench_passes"  # the module and its entry point in a server
FILE_ENV = "BENCH_PASSES_FILE"
TARGET = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
UNTIMED = ("DECODE", "IDLE")

_ended: queue.SimpleQueue[tuple[str, int, Any, Any]] | None = None


def register() -> None:
    """Called by SGLang in each of its processes."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if not torch.cuda.is_available():
        # Stock SGLang needs this on a machine without a GPU; mixquant's versions.machine.allow_cpu says why.
        import sglang.srt.layers.rotary_embedding.base as rotary

        rotary._is_cpu = True
    if FILE_ENV in os.environ:
        HookRegistry.register(TARGET, time_pass, HookType.AROUND)


def time_pass(original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    mode = batch.forward_mode.name
    if mode in UNTIMED or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        return original(runner, batch, *args, **kwargs)
    rows, cuda = len(batch.input_ids), batch.input_ids.is_cuda
    began = stamp(cuda)
    result = original(runner, batch, *args, **kwargs)
    ended().put((mode, rows, began, stamp(cuda)))
    return result


def stamp(cuda: bool) -> Any:
    """A moment: an event on the current stream, or ``perf_counter``."""
    if not cuda:
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def ended() -> queue.SimpleQueue[tuple[str, int, Any, Any]]:
    """The queue of passes to write down; the first call starts the thread that does."""
    global _ended
    if _ended is None:
        _ended = queue.SimpleQueue()
        threading.Thread(target=write, args=(_ended, Path(os.environ[FILE_ENV])), daemon=True).start()
    return _ended


def write(passes: queue.SimpleQueue[tuple[str, int, Any, Any]], path: Path) -> None:
    with path.open("a", buffering=1) as file:
        while True:
            mode, rows, began, end = passes.get()
            if isinstance(end, float):
                ms = 1e3 * (end - began)
            else:
                end.synchronize()
                ms = began.elapsed_time(end)
            file.write(f"{mode} {rows} {ms:.4f}\n")
