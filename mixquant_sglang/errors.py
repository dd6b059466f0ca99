"""The one exception type for what a user can mend: a recipe, a flag, a checkpoint, a GPU, an SGLang version."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MixQuantError(ValueError):
    """Says what is wrong, where, what is allowed and what to do; raised before anything is served."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turns a ``MixQuantError`` into the end of this process with that one line on stderr."""
    try:
        yield
    except MixQuantError as error:
        sys.stdout.flush()
        raise SystemExit(f"mixquant: {error}") from None
