"""What the fuzzer's parts share: how a wrong answer is said, and strings that break things."""

from __future__ import annotations

NASTY = [
    "",
    "\x00",
    "\u2028",
    "é" * 40,
    "|mixquant=bf16",
    "mixquant",
    "bf16",
    "a" * 5000,
    "../..",
    "%s{}",
    "\ud83d\ude00",
]


class WrongError(Exception):
    """What came was not the one right answer."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)


def one_line(error: BaseException) -> None:
    text = str(error)
    check(0 < len(text) < 3000 and "\n" not in text, f"not one line: {text[:300]!r}")
