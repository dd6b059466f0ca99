"""The books of a soak: what each request came to, and whether the servers counted what the requests asked for.

Of a request the client knows its prompt, what of it was cached, what was generated, and how it ended.  From that follow
bounds of the rows that the servers may have run for it.  For one that was answered whole and never retracted they are
exact but for one decode row (overlap scheduling runs a step more before it sees the end):

    low      prompt - cached - 1, in low precision (0 where it asked for BF16)
    high     1, the last prompt token, in BF16 (prompt - cached where it asked for BF16)
    decode   generated - 1, all in BF16: the first token comes from the prefill

(Recipes that protect more than the last prompt token, or decode in low precision, have other rows: not these books.)

A retraction runs the prompt again, and what was generated with it, in BF16.  A request that was cut may have run
anything between nothing and all.  One that was refused or malformed has run nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# How a request may end.  ``wrong`` and ``lost`` must not be.
RIGHT, WRONG, LOST = "right", "wrong", "lost"
ABORTED, CLOSED, GONE, MALFORMED, REFUSED, DOWN = "aborted", "closed", "gone", "malformed", "refused", "down"
BAD = (WRONG, LOST)
NOT_RUN = (MALFORMED, REFUSED)


@dataclass(frozen=True)
class Request:
    """``most``: of new tokens that it may generate.  ``cached`` None: not told.  ``retractions`` None: not told."""

    end: str
    prompt: int = 0
    cached: int | None = None
    generated: int = 0
    most: int = 0
    bf16: bool = False
    retractions: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class Bounds:
    """Rows, least and most."""

    low: tuple[int, int] = (0, 0)
    high: tuple[int, int] = (0, 0)
    decode: tuple[int, int] = (0, 0)

    def __add__(self, other: Bounds) -> Bounds:
        def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
            return a[0] + b[0], a[1] + b[1]

        return Bounds(add(self.low, other.low), add(self.high, other.high), add(self.decode, other.decode))


def bounds(request: Request, *, may_retract: int = 0, knows_cache: bool = True) -> Bounds:
    """Rows of one request.  ``may_retract``: how often one may have been retracted that does not say so itself;
    ``knows_cache``: ``cached`` is what the server that prefilled had (of a pair it is the decode server's)."""
    if request.end in NOT_RUN:
        return Bounds()
    prompt, bf16 = request.prompt, request.bf16
    whole = request.end == RIGHT or request.end == WRONG
    times = request.retractions if whole and request.retractions is not None else may_retract
    again = times * (prompt + request.most)
    began = whole or request.generated > 0  # its prompt was prefilled to the end
    if not began:
        # Nothing came: nothing may have run, or all of it.
        decode = 0, request.most + 1 + times
        high = prompt + again if bf16 else 1 + times * (1 + request.most)
        return Bounds((0, 0 if bf16 else prompt + again), (0, high), decode)
    generated = request.generated if whole else request.most + 1
    known = knows_cache and request.cached is not None
    new = prompt - (request.cached or 0) if known else prompt
    sure = new if known and not times else 1
    decode = max(0, request.generated - 1 - times), generated + times
    if bf16:
        return Bounds((0, 0), (sure, new + again), decode)
    return Bounds((sure - 1, new - 1 + again), (1, 1 + times * (1 + request.most)), decode)


@dataclass(frozen=True)
class Counted:
    """What one server counted: rows by (phase, precision), and protected ones."""

    tokens: Mapping[tuple[str, str], int] = field(default_factory=dict)
    protected: int = 0

    def since(self, before: Counted) -> Counted:
        keys = self.tokens.keys() | before.tokens.keys()
        grown = {key: self.tokens.get(key, 0) - before.tokens.get(key, 0) for key in keys}
        return Counted(grown, self.protected - before.protected)

    def of(self, phase: str, *, low: bool) -> int:
        return sum(n for (name, precision), n in self.tokens.items() if name == phase and (precision != "bf16") == low)


def balance(
    requests: Iterable[Request], prefill: Counted, decode: Counted, *, pair: bool, all_bf16: bool, may_retract: int = 0
) -> list[str]:
    """What does not hold.  ``prefill`` and ``decode`` are what was counted by the server of that half, the same one
    twice where there is one; ``all_bf16``: the recipe knows no low precision."""
    total = Bounds()
    for request in requests:
        total += bounds(request, may_retract=may_retract, knows_cache=not pair)
    wrong = []

    def within(what: str, n: int, least: int, most: int) -> None:
        if not least <= n <= most:
            asked = f"{least}" if least == most else f"{least} to {most}"
            wrong.append(f"{what}: {n} counted, {asked} asked for")

    low, high = prefill.of("prefill", low=True), prefill.of("prefill", low=False)
    if all_bf16:
        within("low prefill rows", low, 0, 0)
        within("prefill rows", high, total.low[0] + total.high[0], total.low[1] + total.high[1])
    else:
        within("low prefill rows", low, *total.low)
        within("BF16 prefill rows", high, *total.high)
        # Decode rows that shared a pass with prompts are protected too; a prefill server has none.
        within("protected rows", prefill.protected, high, high + (0 if pair else decode.of("decode", low=False)))
    within("decode rows", decode.of("decode", low=False), *total.decode)
    within("low decode rows", decode.of("decode", low=True), 0, 0)
    if pair:
        within("prefill rows of the decode server", sum(decode.of("prefill", low=x) for x in (True, False)), 0, 0)
        within("decode rows of the prefill server", sum(prefill.of("decode", low=x) for x in (True, False)), 0, 0)
    return wrong


@dataclass
class Books:
    """Of the whole soak."""

    requests: list[Request] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    retracted: int = 0  # as answers told it
    retracted_by_sglang: int = 0  # as its counter has it, which leaves out pauses
    rounds: int = 0

    def enter(self, request: Request) -> None:
        """Notes a request of the round that is on."""
        self.requests.append(request)
        self.ends[request.end] += 1
        if request.end in BAD:
            self.problems.append(f"{request.end}: {request.detail}")

    def close_round(self) -> list[Request]:
        """The round's requests, which the books let go of: the totals stay."""
        done, self.requests = self.requests, []
        self.rounds += 1
        self.retracted += sum(request.retractions or 0 for request in done)
        return done

    def clean(self) -> bool:
        return not self.problems and not any(self.ends[end] for end in BAD) and self.ends[RIGHT] > 0
