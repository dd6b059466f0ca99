"""Times of calls on a GPU that somebody else may be using: another server that starts, a neighbour's load.

Whoever shares a GPU makes calls longer and never shorter, so what counts are the least times of several rounds.  Times
that others stretched show: the third least is further from the least than noise is.  Then there are more rounds, and
where these do not help, a warning, and what was timed is not kept on disk (``Watch``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch

logger = logging.getLogger(__name__)

ROUNDS = 20
PATIENCE = 4  # times as long, and as many rounds, where times do not settle
AGREEING = 3  # rounds, of which the times of a call are to be near to each other; of a slow GPU, two
NEAR = 1.05  # of the third least time over the least, where nobody disturbed
STRAY = 0.1  # of the calls of one round, that may be further apart: short ones are

Call = Callable[[], object]


@dataclass
class Watch:
    """``disturbed``: whether times were used that did not settle."""

    disturbed: bool = False


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)
_said = False


@contextmanager
def watch() -> Iterator[Watch]:
    """What is timed within, in this thread."""
    found = Watch()
    token = _watch.set(found)
    try:
        yield found
    finally:
        _watch.reset(token)


def _disturbed(apart: float) -> None:
    global _said
    if not _said:  # once for a process
        _said = True
        logger.warning(
            "mixquant: this GPU is in use by others: times of the same kernel were up to %.1fx apart, and what is "
            "chosen by them may not be the fastest; start servers of one GPU one after the other",
            apart,
        )
    watched = _watch.get()
    if watched is not None:
        watched.disturbed = True


def apart(times: Sequence[float]) -> float:
    """The third least of ``times``, or the last of fewer, over the least."""
    ordered = sorted(times)[:AGREEING]
    return ordered[-1] / ordered[0] if ordered[0] > 0 else 1.0


def milliseconds(calls: Sequence[Call], seconds: float) -> list[float]:
    """Of each call on the GPU: the least over up to ``ROUNDS`` rounds through all of them, fewer when ``seconds`` are
    over.  A round that others make longer than that is no reason to stop: one alone agrees with nothing."""
    # Written before each call.  It is more than twice any L2, so weights come from memory as they do between layers; it
    # takes tens of microseconds, in which the host gets ahead of the GPU.
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    event = partial(torch.cuda.Event, enable_timing=True)
    rounds: list[list[float]] = []
    begin = time.monotonic()

    def spread() -> list[float]:
        return sorted(apart(times) for times in zip(*rounds, strict=True))

    def settled() -> bool:
        return all(each <= NEAR for each in spread()[: len(calls) - int(STRAY * len(calls))])

    while True:
        spent, done = time.monotonic() - begin, len(rounds)
        over = done >= ROUNDS or (done >= AGREEING and spent > seconds)
        late = done >= 2 and spent > PATIENCE * seconds
        if late or (over and (done >= PATIENCE * ROUNDS or settled())):
            break
        events = [(event(), event()) for _ in calls]
        for (start, stop), call in list(zip(events, calls, strict=True))[:: -1 if done % 2 else 1]:
            flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        rounds.append([start.elapsed_time(stop) for start, stop in events])
    if not settled():
        _disturbed(spread()[-1])
    return [min(times) for times in zip(*rounds, strict=True)]


def least(sample: Callable[[], float], times: int = 5) -> float:
    """Of so many results of ``sample``, a time, or of ``PATIENCE`` times as many until they settle."""
    found = [sample() for _ in range(times)]
    while apart(found) > NEAR and len(found) < PATIENCE * times:
        found.append(sample())
    if apart(found) > NEAR:
        _disturbed(apart(found))
    return min(found)
