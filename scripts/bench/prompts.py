"""Prompts of random token ids that no cache knows."""

from __future__ import annotations

import random


class NewPrompts:
    """Token ids from 10 to ``vocab``; a prompt's first is no other's, or the cache might hold one of few tokens."""

    def __init__(self, seed: int, vocab: int) -> None:
        self._rng = random.Random(seed)
        self._vocab = vocab
        self._begun: set[int] = set()

    def of(self, length: int) -> list[int]:
        if len(self._begun) > (self._vocab - 10) // 2:
            raise SystemExit(f"more prompts than half of the {self._vocab - 10} token ids that they may begin with")
        first = self._rng.randrange(10, self._vocab)
        while first in self._begun:
            first = self._rng.randrange(10, self._vocab)
        self._begun.add(first)
        return [first, *(self._rng.randrange(10, self._vocab) for _ in range(length - 1))]
