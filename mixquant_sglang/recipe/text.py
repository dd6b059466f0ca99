"""Words of error messages about what a user wrote: short, in one line, with what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence


def nearest(word: str, known: Collection[str], most: int = 1) -> list[str]:
    """At most ``most`` of ``known`` that look like ``word``, the nearest first; case does not count."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[low] for low in difflib.get_close_matches(word.lower(), by_lower, n=most)]


def did_you_mean(near: list[str]) -> str:
    """The end of an error message: ``; did you mean 'x'?``, or nothing where nothing is near."""
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def show(value: str) -> str:
    """A user's value for an error message: quoted, in one line, not longer than a line can bear."""
    short = value if len(value) <= 80 else value[:77] + "..."
    return f"'{short}'" if short.isprintable() else repr(short)  # repr would double the backslashes of a regex


def some(names: Sequence[str], most: int = 4) -> str:
    """The first ``most`` of ``names``, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
