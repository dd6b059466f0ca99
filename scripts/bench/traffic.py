"""Requests of a real service, out of a file: when they came, how long they were, which prefixes they shared.

Two forms, told apart by the file's ending:

    .jsonl  Mooncake's: timestamp (ms), input_length, output_length, hash_ids: an id for each block of 512 tokens of the
            prompt, the last one partial.  Equal ids: equal blocks, and all before them equal too
    .csv    Azure's of 2023: TIMESTAMP, ContextTokens, GeneratedTokens.  It does not tell what prompts share: nothing

The files have no text.  Token ids are drawn for each block from a seed and the block's id, so that prompts share the
tokens that they shared in the service, and no others.  Answers are the server's own: a later prompt, which holds the
answer that the service gave, shares the prompt before it but not its answer.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from scripts.bench.client import encode

BLOCK = 512  # tokens of a hash id
ARRIVALS = ("trace", "spread", "poisson")


class BadTrace(ValueError):
    """What is wrong with a file, and where."""


@dataclass(frozen=True)
class Request:
    """``time``: seconds after the first.  ``blocks``: ids, one for each block of the prompt."""

    time: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """What is replayed: ``of`` requests in the file, some of them ``cut`` or ``dropped`` for their length."""

    requests: tuple[Request, ...]
    block: int
    of: int
    cut: int = 0
    dropped: int = 0

    @property
    def longest(self) -> int:
        return max(one.prompt_tokens + one.output_tokens for one in self.requests)


def read(file: Path) -> list[Request]:
    """All requests, by time.  Raises BadTrace, or OSError."""
    rows = {".jsonl": _mooncake, ".csv": _azure}.get(file.suffix)
    if rows is None:
        raise BadTrace(f"{file}: ends neither in .jsonl (Mooncake's) nor in .csv (Azure's)")
    found = sorted(rows(file), key=lambda one: one.time)
    if not found:
        raise BadTrace(f"{file}: no requests")
    return [replace(one, time=one.time - found[0].time) for one in found]


def _mooncake(file: Path) -> Iterator[Request]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                blocks = tuple(int(one) for one in row["hash_ids"])
                one = Request(row["timestamp"] / 1e3, int(row["input_length"]), int(row["output_length"]), blocks)
            except (KeyError, TypeError, ValueError) as error:
                raise BadTrace(f"{file}:{number}: no request of Mooncake's ({error!r})") from None
            if len(blocks) != -(-one.prompt_tokens // BLOCK):
                raise BadTrace(f"{file}:{number}: {len(blocks)} hash_ids for {one.prompt_tokens} tokens, {BLOCK} each")
            yield _checked(one, file, number)


def _azure(file: Path) -> Iterator[Request]:
    ids = itertools.count()
    with file.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            try:
                # Seven places after the point, of which datetime knows six.
                when = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=timezone.utc).timestamp()
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise BadTrace(f"{file}:{number}: no request of Azure's ({error!r})") from None
            blocks = tuple(itertools.islice(ids, max(0, -(-prompt // BLOCK))))
            yield _checked(Request(when, prompt, output, blocks), file, number)


def _checked(one: Request, file: Path, number: int) -> Request:
    if min(one.prompt_tokens, one.output_tokens) < 1:
        raise BadTrace(f"{file}:{number}: {one.prompt_tokens} tokens, {one.output_tokens} generated; at least 1 each")
    return one


def take(
    requests: Sequence[Request],
    *,
    skip: int = 0,
    limit: int | None = None,
    scale_input: float = 1,
    scale_output: float = 1,
    longest: int | None = None,
    drop: bool = False,
) -> Traffic:
    """``limit`` requests after ``skip``, with prompts and answers of so many times the tokens.

    Prompts are scaled block by block, so that they share what they shared.  A request of more than ``longest`` tokens,
    prompt and answer, loses the end of its prompt, or is dropped.  (Prompts cut behind a shared prefix become equal.)
    """
    block = max(1, round(BLOCK * scale_input))
    some = requests[skip : None if limit is None else skip + limit]
    found, cut, dropped = [], 0, 0
    for one in some:
        whole = len(one.blocks) - 1
        rest = max(1, round((one.prompt_tokens - BLOCK * whole) * scale_input))
        prompt, output = whole * block + rest, max(1, round(one.output_tokens * scale_output))
        if longest is not None and prompt + output > longest:
            if drop:
                dropped += 1
                continue
            cut += 1
            output = min(output, longest - 1)
            prompt = min(prompt, longest - output)
        found.append(replace(one, prompt_tokens=prompt, output_tokens=output, blocks=one.blocks[: -(-prompt // block)]))
    if not found:
        raise BadTrace(f"no request is left of {len(some)}")
    return Traffic(
        tuple(replace(one, time=one.time - found[0].time) for one in found), block, len(requests), cut, dropped
    )


def due(requests: Sequence[Request], arrivals: str, seed: str, *, rate: float = 0, speed: float = 0) -> list[float]:
    """Seconds after the start at which each is sent, whatever became of those before it.

    ``rate``: so many a second on average; else the file's times, ``speed`` times as fast.  ``arrivals``: "trace", the
    file's times, bursts included; "spread", those that have the same time (Mooncake's conversations: all of 3 s) evenly
    until the next ones; "poisson", intervals drawn from an exponential distribution of the mean rate.
    Raises BadTrace where the file's times have no rate.
    """
    times = [one.time for one in requests]
    if len(times) == 1:
        return [0.0]
    span = times[-1]
    mean = rate or ((len(times) - 1) * speed / span if span else 0)
    if not mean or (arrivals != "poisson" and not span):
        raise BadTrace(f"all {len(times)} requests have the same time; use --rate with --arrivals poisson")
    if arrivals == "poisson":
        rng = random.Random(f"{seed} arrivals")
        return [0.0, *itertools.accumulate(rng.expovariate(mean) for _ in times[1:])]
    stretch = (len(times) - 1) / (mean * span)
    return [stretch * when for when in (_spread(times) if arrivals == "spread" else times)]


def _spread(times: list[float]) -> list[float]:
    """The last group's interval is that before it, so that nothing comes after where the next group would be."""
    groups = [(when, len([*some])) for when, some in itertools.groupby(times)]
    ends = [when for when, _ in groups[1:]] + [2 * groups[-1][0] - groups[-2][0]]
    return [
        when + (end - when) * i / count for (when, count), end in zip(groups, ends, strict=True) for i in range(count)
    ]


class Prompts:
    """Token ids of ``traffic``'s prompts, below ``vocab``: those of a block follow from ``seed`` and its id."""

    def __init__(self, traffic: Traffic, vocab: int, seed: str) -> None:
        self._block = traffic.block
        self._encoded: dict[int, bytes] = {}
        self._ids: dict[int, list[int]] = {}
        ids = range(10, vocab)
        last = {one.blocks[-1] for one in traffic.requests}
        for block in {block for one in traffic.requests for block in one.blocks}:
            tokens = random.Random(f"{seed} block {block}").choices(ids, k=self._block)
            self._encoded[block] = encode(tokens)
            if block in last:  # which may be partial
                self._ids[block] = tokens

    def encoded(self, one: Request) -> bytes:
        """As JSON without brackets."""
        *whole, last = one.blocks
        rest = self._ids[last][: one.prompt_tokens - self._block * len(whole)]
        return b",".join([*(self._encoded[block] for block in whole), encode(rest)])


def shared(traffic: Traffic) -> float:
    """The share of all prompt tokens that a request before had in the same place: what an endless cache would serve.
    (The last token of a prompt is computed always.)"""
    known: dict[int, int] = {}  # block -> the most tokens of it in a prompt
    hits = 0
    for one in traffic.requests:
        left, found = one.prompt_tokens, 0
        for block in one.blocks:
            tokens = min(left, traffic.block)
            served = min(tokens, known.get(block, 0))
            found += served
            if served < tokens:
                break
            left -= tokens
        hits += min(found, one.prompt_tokens - 1)
        left = one.prompt_tokens
        for block in one.blocks:
            known[block] = max(known.get(block, 0), min(left, traffic.block))
            left -= traffic.block
    return hits / sum(one.prompt_tokens for one in traffic.requests)
