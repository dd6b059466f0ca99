"""A progress bar, or, where stderr is no terminal, a line every ten seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm  # type: ignore[import-untyped]

SECONDS = 10.0


class Bar(tqdm):  # type: ignore[misc]
    """``tqdm`` on stderr; without a terminal it writes lines, the last of them at its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty():
            kwargs = {"mininterval": SECONDS, "maxinterval": SECONDS, "ncols": 100, **kwargs}
        super().__init__(*args, file=sys.stderr, **kwargs)

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        if file.isatty():
            printer: Callable[[str], None] = tqdm.status_printer(file)
            return printer

        def line(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return line
