"""A server that speaks as much of SGLang's HTTP as the benchmarks' client does, and does what a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OK, BUSY, FULL, BROKEN, DROPPED, SHORT, SLOW = "ok", "busy", "full", "broken", "dropped", "short", "slow"


@dataclass
class Stub:
    """``behave``: how request number n (from 0, of those that came) ends.  ``first_s``: to a first token (SLOW: 2.5).
    ``together``: so many requests must have come (since the cache was emptied) before one is answered, or all break.
    ``seen``: times of arrival, prompts, tokens asked for.  The cache is endless; /flush_cache empties it.
    """

    behave: Callable[[int], str] = lambda number: OK
    first_s: float = 0.0
    together: int = 1
    seen: list[tuple[float, list[int], int]] = field(default_factory=list)
    flushed: list[int] = field(default_factory=list)  # after how many requests
    url: str = ""
    _known: list[list[int]] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)

    def enter(self, prompt: list[int], tokens: int) -> tuple[int, int]:
        """(its number, tokens that the cache has)."""
        with self._lock:
            self.seen.append((time.perf_counter(), prompt, tokens))
            cached = max((common(prompt, one) for one in self._known), default=0)
            self._known.append(prompt)
            return len(self.seen) - 1, min(cached, len(prompt) - 1)

    def flush(self) -> None:
        with self._lock:
            self.flushed.append(len(self.seen))
            self._known.clear()

    def gathered(self) -> bool:
        deadline = time.monotonic() + 5
        while len(self._known) < self.together and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(self._known) >= self.together


def common(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@contextmanager
def serve(stub: Stub) -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/flush_cache":
                stub.flush()
                return self.answer(200)
            asked = json.loads(body)
            tokens = asked["sampling_params"]["max_new_tokens"]
            number, cached = stub.enter(asked["input_ids"], tokens)
            how = stub.behave(number)
            if how == BUSY:
                return self.answer(503, b"busy")
            if how == DROPPED or not stub.gathered():
                return None
            self.answer(200)
            meta = {"prompt_tokens": len(asked["input_ids"]), "cached_tokens": cached, "finish_reason": None}
            if how == FULL:
                full = {"type": "abort", "status_code": 503, "message": "The request queue is full."}
                return self.event([], {**meta, "completion_tokens": 0, "finish_reason": full})
            time.sleep(2.5 if how == SLOW else stub.first_s)
            for i in range(tokens - (how == SHORT)):
                if i == 1 and how == BROKEN:
                    return None
                self.event([i], {**meta, "completion_tokens": i + 1})
            self.wfile.write(b"data: [DONE]\n\n")

        def answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def event(self, ids: list[int], meta: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps({"output_ids": ids, "meta_info": meta}).encode() + b"\n\n")
            self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has given up is none."""

    server = Server(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
