"""Answers under way on a server while something else is asked of it: one streamed request of several prompts."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import orjson

LIMIT_S = 60.0  # for all of them to begin


class Streams:
    """``tokens``: how many each has by now; ``ended``: whether one has no more to come."""

    def __init__(self, arm: Any, prompts: list[list[int]], most: int) -> None:
        self.tokens = [0] * len(prompts)
        self.ended = False
        self._arm = arm
        params = {"temperature": 0, "max_new_tokens": most, "ignore_eos": True}
        body = orjson.dumps({"input_ids": prompts, "sampling_params": params, "stream": True})
        self._request = urllib.request.Request(arm.url + "/generate", body, {"Content-Type": "application/json"})
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=600) as response:
                for line in response:
                    self._take(line.strip())
        finally:
            self.ended = True

    def _take(self, line: bytes) -> None:
        if not line.startswith(b"data: {"):
            return
        out = json.loads(line.removeprefix(b"data: "))
        meta = out.get("meta_info", {})
        self.tokens[out.get("index", 0)] = meta.get("completion_tokens", 0)
        self.ended = self.ended or bool(meta.get("finish_reason")) or "error" in out

    def wait(self) -> None:
        """Until each has had a decode step."""
        deadline = time.monotonic() + LIMIT_S
        while min(self.tokens) < 2:
            if self.ended or time.monotonic() > deadline:
                raise self._arm.failed(f"does not answer {len(self.tokens)} streams at once: {self.tokens} tokens")
            time.sleep(0.002)

    def check(self) -> None:
        if self.ended:
            raise self._arm.failed(f"was done with streams that were to go on: {self.tokens} tokens")

    def stop(self) -> None:
        self._arm.post("/abort_request", {"abort_all": True})
        self._thread.join(timeout=LIMIT_S)
        self._arm.flush()  # which waits until none is left


@contextlib.contextmanager
def under_way(arm: Any, prompts: list[list[int]], most: int) -> Iterator[Streams]:
    """Each of ``prompts`` is answered, at most ``most`` tokens, until the block ends; the cache is empty then."""
    streams = Streams(arm, prompts, most)
    try:
        streams.wait()
        yield streams
    finally:
        streams.stop()
