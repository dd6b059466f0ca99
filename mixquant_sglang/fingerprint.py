"""A short name for the numbers that a server computes: equal where recipe, device and package come to the same.

Ranks of one server compare it at load, and stores of KV that outlive a server keep what differs apart.  What only names
or explains (name, description, file and line, reason) and what the selection has resolved (``auto``) is left out; any
other field counts, also one that a later version adds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mixquant_sglang import __version__
from mixquant_sglang.kernels import Selection
from mixquant_sglang.recipe import LayerRule, Recipe

_LEFT_OUT: dict[type, frozenset[str]] = {
    Recipe: frozenset(
        # the last three are in the selection, resolved; verify compares and changes nothing
        {"name", "source", "description", "prefill_weights_at", "verify", "prefill", "decode", "kernel"}
    ),
    LayerRule: frozenset({"where", "optional"}),
    Selection: frozenset({"reason"}),
}


def fingerprint(recipe: Recipe, selection: Selection) -> str:
    """16 hexadecimal digits.  Ready-made weights count by the name that the recipe gives them, not by their content."""
    facts = {"version": __version__, "recipe": _plain(recipe), "selection": _plain(selection)}
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """``value`` as JSON has it; a type that JSON would have to guess at raises ``TypeError``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = {field.name for field in dataclasses.fields(value)} - _LEFT_OUT.get(type(value), frozenset())
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
