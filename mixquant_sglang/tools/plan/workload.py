"""What a server is asked for: tokens and requests, and the prefill passes that they make."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.rates import ATTENTION_TILE

# Of one prefill: what a second of planning can walk through, whatever the prompts and chunks are.
MOST_TOKENS, MOST_PASSES = 50_000_000, 200_000


class Pass(NamedTuple):
    """``rows`` of tokens that see ``pairs`` keys in all; prompts that end; ``tokens`` of its requests, their prefixes
    included; ``each``: new rows of a request, weighted by its tokens."""

    rows: int
    pairs: float
    ends: int
    tokens: int
    each: float


@dataclass(frozen=True)
class Workload:
    """Tokens of each of ``batch`` requests: ``input_len`` in the prompt, ``cached`` of them in the radix cache (but one
    is computed in any case, as SGLang does), ``output_len`` generated; ``tp`` GPUs; ``chunk`` prefill tokens per pass,
    None for what SGLang chooses on the GPU; ``ep`` of the GPUs hold different experts. MixQuantError for values that
    make no sense."""

    input_len: int
    cached: int = 0
    output_len: int = 1
    batch: int = 1
    tp: int = 1
    chunk: int | None = None
    ep: int = 1

    def __post_init__(self) -> None:
        least = {"input_len": 1, "cached": 0, "output_len": 1, "batch": 1, "tp": 1, "chunk": 64, "ep": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value <= MOST_TOKENS:
                raise MixQuantError(
                    f"--{name.replace('_', '-')}: {str(value)[:20]} is out of range; allowed: {bound} to {MOST_TOKENS}"
                )
        if self.cached > self.input_len:
            raise MixQuantError(
                f"--cached: {self.cached} tokens are more than the prompt has; allowed: 0 to --input-len, "
                f"which is {self.input_len}"
            )
        if self.new * self.batch > MOST_TOKENS:
            raise MixQuantError(
                f"--input-len, --batch: {self.new} x {self.batch} tokens to prefill; allowed: at most {MOST_TOKENS}"
            )
        if self.chunk is not None and self.new * self.batch > MOST_PASSES * self.chunk:
            raise MixQuantError(
                f"--chunk: {self.new} x {self.batch} tokens in passes of {self.chunk} are more than {MOST_PASSES} "
                f"passes; allowed: at least {-(-self.new * self.batch // MOST_PASSES)}"
            )

    @property
    def new(self) -> int:
        return max(1, self.input_len - self.cached)

    def passes(self, gpu: Gpu) -> Iterator[tuple[int, float, int]]:
        """(token rows, visible keys summed over them, prompts that end) of each prefill pass; requests fill the chunks
        in turn."""
        return ((one.rows, one.pairs, one.ends) for one in self.walk(self.chunk or gpu.chunk))

    def kinds_of_passes(self, gpu: Gpu) -> tuple[tuple[int, int, int, float], ...]:
        """(token rows, prompts that end, how many passes have both, visible keys summed over them all)."""
        return _kinds_of_passes(self, self.chunk or gpu.chunk)

    def pairs(self, gpu: Gpu, window: int | None) -> float:
        """Keys that attention over ``window`` tokens sees, None for all of them, summed over all rows."""
        return _pairs(self, self.chunk or gpu.chunk, window)

    def walk(self, chunk: int, window: int | None = None) -> Iterator[Pass]:
        """Its passes of ``chunk`` tokens, one after the other; ``window`` counts in their pairs."""
        left, at = self.new * self.batch, 0
        while left:
            rows, pairs, tokens, products = min(chunk, left), 0.0, 0, 0
            todo = rows
            while todo:  # at most three times: the rest of a prompt, whole prompts, the beginning of one
                begin = at % self.new
                take = min(todo, self.new - begin)
                whole = todo // self.new if not begin and take == self.new else 1
                keys = self.input_len - self.new + begin
                pairs += whole * _visible(take, keys, window)
                tokens += whole * (keys + take)
                products += whole * take * (keys + take)
                at, todo = at + whole * take, todo - whole * take
            left -= rows
            yield Pass(rows, pairs, at // self.new - (at - rows) // self.new, tokens, products / tokens)


def _visible(rows: int, before: int, window: int | None) -> float:
    """Keys that ``rows`` consecutive queries behind ``before`` tokens see, as a kernel computes them: by tiles."""
    tile = min(rows, ATTENTION_TILE)
    if window is None or before + rows <= window:
        return rows * (before + (rows + tile) / 2)
    rising = max(0, min(rows, window - before))  # queries whose window still grows
    return rising * (before + (rising + tile) / 2) + (rows - rising) * (window + tile / 2)


@functools.lru_cache(maxsize=256)
def _pairs(work: Workload, chunk: int, window: int | None) -> float:
    return sum(one.pairs for one in work.walk(chunk, window))


@functools.lru_cache(maxsize=64)  # one for each point of a plot, which all recipes share
def _kinds_of_passes(work: Workload, chunk: int) -> tuple[tuple[int, int, int, float], ...]:
    kinds: dict[tuple[int, int], tuple[int, float]] = {}
    for one in work.walk(chunk):
        count, summed = kinds.get((one.rows, one.ends), (0, 0.0))
        kinds[one.rows, one.ends] = count + 1, summed + one.pairs
    return tuple((rows, ends, count, pairs) for (rows, ends), (count, pairs) in kinds.items())
