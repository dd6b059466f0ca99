"""bench_bursts: what is asked, of whom, and how it is told."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import bursts
from scripts.bench.bursts import Case, measure, read, tables
from scripts.bench.streams import under_way

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]


class Arm:
    """A server with a cache of whole prompts; a pass has 8192 rows at most."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self.asked: list[tuple[list[list[int]], dict[str, Any]]] = []

    def generate(self, prompts: list[list[int]], tokens: int, **more: Any) -> tuple[float, list[dict[str, Any]]]:
        assert tokens == 1
        known = [prompt for asked, _ in self.asked for prompt in asked]
        metas = [{"cached_tokens": len(prompt) - 1 if prompt in known else 0} for prompt in prompts]
        self.asked.append((prompts, more))
        return self.seconds * len(prompts), metas

    def mark(self) -> int:
        return 0

    def passes(self, _mark: int, rows: int, _beside: int) -> list[float]:
        return [self.seconds / 2] * -(-rows // 8192)


def arguments(*more: str, tmp_path: Path) -> tuple[argparse.Namespace, list[Case]]:
    return read(["--model", str(ROOT / "tests/models/tiny-qwen3"), "--logs", str(tmp_path), *more])


def test_what_is_asked(tmp_path: Path) -> None:
    args, asked = arguments("--counts", "1", "17", "--tokens", "64", tmp_path=tmp_path)
    assert [case.key for case in asked] == ["burst_1x64", "burst_17x64"]
    assert args.arms == ["stock-bf16", "fp8"]
    more = ["--logprobs", "--cached", "1", "65", "--bf16-requests", "--beside", "8", "--lengths", "512"]
    args, asked = arguments("--counts", *more, "--", "--enable-mixed-chunk", tmp_path=tmp_path)
    keys = ["logprobs_1x512", "cached_1x512", "cached_65x512", "bf16_1x512", "beside_1x512+8"]
    assert [case.key for case in asked] == keys and args.flags == ["--enable-mixed-chunk"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--counts", "0"], "--counts: at least 1"),
        (["--counts"], "nothing is asked"),
        (["--counts", "300", "--tokens", "256"], "burst_300x256 needs 77100"),
        (["--beside", "256"], "beside_1x512.256 needs 197121"),
        (["--cached", "1", "--lengths", "1"], "at least 2 with --cached"),
    ],
)
def test_what_cannot_be_asked(wrong: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        arguments(*wrong, tmp_path=tmp_path)
    assert said in capsys.readouterr().err.replace("+", ".")


def test_each_mode_as_it_is_asked_and_told() -> None:
    asked = [Case("burst", 64, 1), Case("burst", 64, 200), Case("logprobs", 512), Case("cached", 512, 2)]
    asked.append(Case("bf16", 512))
    arms: list[Any] = [Arm("stock-bf16", 0.010), Arm("fp8", 0.008)]
    args = argparse.Namespace(rounds=2, rest=0, seed=0, idle="stopped", vocab=5000)
    found = measure(arms, asked, args)
    assert found["fp8"]["burst_200x64"] == pytest.approx({"request": 1600, "pass": 8, "passes": 2})
    assert found["fp8"]["cached_2x512"] == pytest.approx({"request": 16, "pass": 4, "passes": 1})
    for arm in arms:  # a warm-up and two rounds
        rounds = [[], [], [("return_logprob", True), ("logprob_start_len", 0)], [], []]
        rounds.append([] if arm.name == "stock-bf16" else [*bursts.BF16.items()])
        assert [[*more.items()] for _, more in arm.asked] == rounds * 3
        assert [len(prompts) for prompts, _ in arm.asked] == [1, 200, 1, 2, 2, 1] * 3
    lines = tables(asked, found)
    assert [line for line in lines if line[:1].isalpha()] == ["burst, 64 tokens each", "logprobs", "cached", "bf16"]
    assert lines[1].split() == ["request", "(ms)", "1x64", "200x64"]
    assert lines[3].split() == ["fp8", "8.00", "(1.250x)", "1600.00", "(1.250x)"]
    assert lines[7].split() == ["passes", "(number)", "1x64", "200x64"] and lines[9].split() == ["fp8", "1", "2"]


def test_a_cache_that_knows_a_new_prompt_ends_it() -> None:
    class Knows(Arm):
        def generate(self, prompts: list[list[int]], tokens: int, **more: Any) -> tuple[float, list[dict[str, Any]]]:
            return 1.0, [{"cached_tokens": 3}]

    args = argparse.Namespace(rounds=1, rest=0, seed=0, idle="stopped", vocab=500)
    with pytest.raises(SystemExit, match="3"):
        measure([Knows("fp8", 1)], [Case("burst", 64)], args)  # type: ignore[list-item]


class Streaming:
    """A server whose answers go on until they are aborted, or end after ``most`` tokens."""

    name = "fp8"

    def __init__(self, most: int) -> None:
        self.aborted, self.flushed = threading.Event(), False
        arm = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                count = 0
                while count < most and not arm.aborted.is_set():
                    count += 1
                    for index, _ in enumerate(body["input_ids"]):
                        meta = {
                            "completion_tokens": count,
                            "finish_reason": {"type": "length"} if count == most else None,
                        }
                        self.wfile.write(b"data: %b\n\n" % json.dumps({"index": index, "meta_info": meta}).encode())
                    self.wfile.flush()
                    arm.aborted.wait(0.001 if count < most else 0)
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def post(self, path: str, body: dict[str, Any]) -> None:
        assert (path, body) == ("/abort_request", {"abort_all": True})
        self.aborted.set()

    def flush(self) -> None:
        self.flushed = True

    def failed(self, what: str) -> SystemExit:
        return SystemExit(f"{self.name} {what}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def streaming(request: pytest.FixtureRequest) -> Iterator[Streaming]:
    arm = Streaming(request.param)
    yield arm
    arm.close()


@pytest.mark.parametrize("streaming", [1 << 20], indirect=True)
def test_answers_are_under_way_until_they_are_aborted(streaming: Streaming) -> None:
    with under_way(streaming, [[1], [2], [3]], 512) as streams:
        assert len(streams.tokens) == 3 and min(streams.tokens) >= 2
        streams.check()
    assert streaming.aborted.is_set() and streaming.flushed and streams.ended


@pytest.mark.parametrize("streaming", [1, 2], indirect=True)
def test_answers_that_end_by_themselves_are_an_error(streaming: Streaming) -> None:
    said = pytest.raises(SystemExit, match=r"fp8 (does not answer 2 streams at once|was done with streams)")
    with said, under_way(streaming, [[1], [2]], 512) as streams:
        threading.Event().wait(0.2)
        streams.check()
    assert streaming.flushed
