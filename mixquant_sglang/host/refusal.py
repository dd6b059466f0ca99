"""What a refusal of a flag is; ``refused.py`` has ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """``field`` of ``ServerArgs`` (dots go on into what it holds), how much of it is refused, why, and the way out.

    ``devices``: of which ``--device`` alone this is asked; empty for all.  ``unless``: fields that, if one is set, give
    ``field`` another meaning.  ``low``: asked only where the recipe has some layer run low.  ``gathered``: asked only
    with DP attention; ``deterministic``: only with deterministic inference."""

    field: str
    flag: str
    refused: Callable[[Any], bool]
    why: str
    instead: str
    devices: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    low: bool = False
    gathered: bool = False
    deterministic: bool = False


def is_set(value: Any) -> bool:
    """Whether a flag asks for anything."""
    return value not in (None, "", "none", "null", "off", False, 0)


def gathers(args: Any) -> bool:
    """Whether ranks attend to batches of their own, and gather the rows of all in between (DP attention)."""
    return is_set(getattr(args, "enable_dp_attention", None)) or (getattr(args, "attn_dp_size", None) or 1) > 1


def deterministic(args: Any) -> bool:
    """Whether a request's tokens are not to depend on what else is in its batch."""
    return is_set(getattr(args, "enable_deterministic_inference", None))


def several(value: Any) -> bool:
    """Whether it is more than one."""
    return bool(value > 1)
