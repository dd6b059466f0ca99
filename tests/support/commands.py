"""The commands of ``scripts/``, run with this Python and the package that it finds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

MAIN = Path(__file__).resolve().parents[2] / "scripts" / "__main__.py"


def command_of(name: str) -> list[str]:
    """What ``scripts/NAME`` executes."""
    return [sys.executable, str(MAIN), name]


def provide() -> None:
    """Tests can import ``scripts``, without the checkout on ``sys.path``: there it would hide the installed package."""
    runpy.run_path(str(MAIN))["provide"]()
