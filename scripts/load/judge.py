"""What a reply is: right, wrong, lost, or ended by a fault that the soak itself made."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from scripts.load.books import ABORTED, CLOSED, DOWN, GONE, LOST, REFUSED, RIGHT, WRONG, Request
from scripts.load.client import Reply
from scripts.load.problems import Agent, Question, owner

OUTAGE, BURST, ABORT_ALL = "outage", "burst", "abort_all"


@dataclass
class Windows:
    """When a server was away, the queue was full, or all requests were aborted: what excuses a reply, and when."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def open(self, kind: str) -> int:
        self.spans.append((kind, time.monotonic(), float("inf")))
        return len(self.spans) - 1

    def close(self, index: int, grace_s: float = 0.0) -> None:
        kind, began, _ = self.spans[index]
        self.spans[index] = kind, began, time.monotonic() + grace_s

    def during(self, kind: str, began: float, ended: float) -> bool:
        return any(kind == name and began <= until and start <= ended for name, start, until in self.spans)


@dataclass(frozen=True)
class Asked:
    """``cut``: what was done to it: "", "abort", "close" or "leave"; ``sent``: characters of its prompt, which bound
    its tokens where the server did not get to count them."""

    question: Question
    bf16: bool = False
    cut: str = ""
    sent: int = 0


def judge(asked: Asked, reply: Reply, windows: Windows, agents: list[Agent]) -> Request:
    end, detail = _end(asked, reply, windows)
    if end == WRONG:
        question = asked.question
        detail = (
            f"agent {question.agent}, {question.text[-40:]!r}: {reply.text[:300]!r}{owner(agents, reply.text)}; "
            f"{question.right[:300]!r} is right (status {reply.status}, finish {reply.finish!r}, "
            f"{reply.retractions} retractions, cached {reply.cached} of {reply.prompt}, BF16 {asked.bf16})"
        )
    return Request(
        end,
        reply.prompt or asked.sent,
        reply.cached if reply.prompt else None,
        reply.generated,
        asked.question.tokens,
        asked.bf16,
        reply.retractions if reply.whole else None,
        detail,
    )


def _end(asked: Asked, reply: Reply, windows: Windows) -> tuple[str, str]:
    right = asked.question.right
    if reply.whole:
        return (RIGHT if reply.text == right else WRONG), ""
    if not right.startswith(reply.text):
        return WRONG, ""
    aborted = reply.finish == "abort" or "abort" in reply.error.lower()
    if asked.cut == "leave" and not reply.error:
        return GONE, ""
    if asked.cut == "close" and not reply.error and reply.status == 200:
        return CLOSED, ""
    if aborted and (asked.cut == "abort" or windows.during(ABORT_ALL, reply.began, reply.ended)):
        return ABORTED, ""
    if "queue is full" in reply.error and windows.during(BURST, reply.began, reply.ended):
        return REFUSED, ""
    if windows.during(OUTAGE, reply.began, reply.ended):
        return DOWN, ""
    said = reply.error or f"ended without a reason after {reply.generated} tokens"
    took = reply.ended - reply.began
    return (
        LOST,
        f"agent {asked.question.agent}, {asked.cut or 'not cut'}: status {reply.status}, {took:.1f} s, {said[:400]}",
    )
