"""bench_bursts: what is asked, of whom, and how it is told."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import bursts
from scripts.bench.bursts import Case, measure, read, tables

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
