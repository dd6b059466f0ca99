"""The recipe that a launcher sent along with its arguments (``hooks/arrival.py``): its file may be on no other node."""

from __future__ import annotations

from mixquant_sglang import recipe
from mixquant_sglang.recipe import Recipe

_sent: Recipe | None = None


def keep(wanted: Recipe) -> None:
    global _sent
    _sent = wanted


def served() -> Recipe:
    """What was sent to this process, else what the environment asks for; raises ``MixQuantError``."""
    return recipe.load_requested() if _sent is None else _sent
