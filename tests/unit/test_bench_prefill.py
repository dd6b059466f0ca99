"""Prompts that bench_prefill times are new to the server, even those of one token."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from scripts.bench.prefill import measure


class Arm:
    """A server whose cache knows prompts by their first token."""

    def __init__(self, name: str) -> None:
        self.name, self.begun = name, set[int]()

    def generate(self, prompts: list[list[int]], _tokens: int) -> tuple[float, list[dict[str, Any]]]:
        metas = [{"cached_tokens": 1 if prompt[0] in self.begun else 0} for prompt in prompts]
        self.begun |= {prompt[0] for prompt in prompts}
        return 1.0, metas

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


def test_a_vocabulary_may_be_too_small() -> None:
    with pytest.raises(SystemExit, match="more prompts than half"):
        measure([Arm("a"), Arm("b")], arguments(40))  # type: ignore[list-item]
