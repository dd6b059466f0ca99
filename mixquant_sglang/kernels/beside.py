"""Small kernels beside large ones: on a stream of their own, where a CUDA graph is captured.

Few rows of many weights are a matter of latency, and leave most of a GPU idle.  In a captured graph a second branch
costs nothing to launch; launched one by one, the events would cost the host what the GPU gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


class Beside:
    """One branch: ``with branch.run():`` what runs beside, then ``branch.join()`` before its results are read.

    What it reads must be complete on the current stream when it begins; what it writes, allocated there."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            index = torch.cuda.current_device() if device.index is None else device.index
            self._stream = _stream(index)

    @contextmanager
    def run(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
