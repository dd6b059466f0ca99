"""Prompts that bench_prefill times are new to the server, even those of one token."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from scripts.bench.prefill import measure

pytestmark = pytest.mark.once


class Arm:
    """A server whose cache knows prompts by their first token."""

    def __init__(self, name: str) -> None:
        self.name, self.begun, self.asked = name, set[int](), list[list[int]]()

    def generate(self, prompts: list[list[int]], _tokens: int) -> tuple[float, list[dict[str, Any]]]:
        metas = [{"cached_tokens": self.cached(prompt)} for prompt in prompts]
        self.begun |= {prompt[0] for prompt in prompts}
        self.asked += prompts
        return 1.0, metas

    def cached(self, prompt: list[int]) -> int:
        return 1 if prompt[0] in self.begun else 0

    def mark(self) -> int:
        return 0

    def pass_seconds(self, _mark: int, _rows: int) -> float:
        return 0.5


def arguments(vocab: int) -> argparse.Namespace:
    found = {"lengths": [1], "prefixes": [0], "batches": [2], "decode_context": 1, "rounds": 9, "decode_rounds": 2}
    return argparse.Namespace(**found, rest=0, seed=0, idle="stopped", vocab=vocab)


def test_a_prompt_of_one_token_is_not_in_the_cache() -> None:
    arms: list[Any] = [Arm("stock-bf16"), Arm("stock-again")]
    found = measure(arms, arguments(120))
    assert found == {arm.name: {"prefill_1": 1000, "pass_1": 500, "decode_b2_1": 0} for arm in arms}
    assert len(arms[0].begun) == 10 + 2 * 3  # decode in two rounds and the warm-up


def test_one_request_of_a_round_leaves_the_prefix_of_all_lengths() -> None:
    class Radix(Arm):
        def cached(self, prompt: list[int]) -> int:
            return next((len(old) for old in self.asked if prompt[: len(old)] == old), 0)

    args = arguments(1000)
    args.lengths, args.prefixes, args.batches, args.rounds = [2, 5, 9], [0, 20], [], 3
    arms: list[Any] = [Radix("stock-bf16"), Radix("fp8")]
    found = measure(arms, args)
    assert [*found["fp8"]] == [
        f"{kind}_{n}{at}" for at in ("", "@20") for n in (2, 5, 9) for kind in ("prefill", "pass")
    ]
    for arm in arms:  # a warm-up and three rounds
        assert [len(prompt) for prompt in arm.asked] == [2, 5, 9, 20, 22, 25, 29] * 4


def test_a_vocabulary_may_be_too_small() -> None:
    with pytest.raises(SystemExit, match="more prompts than half"):
        measure([Arm("a"), Arm("b")], arguments(40))  # type: ignore[list-item]
