"""A short name for what decides the KV that a server writes: equal where recipe, device and package come to the same.

Ranks of one server compare it at load, and it names KV (``policy.kv_name``) in the radix cache and in stores that
outlive the process.  What only names or explains (name, description, file and line, reason) and what the selection has
resolved (``auto``) is left out; any other field counts, also one that a later version adds.  All that
run BF16 throughout have ``policy.BF16``.  Not in it: the BF16 checkpoint, by whose name stores separate servers
themselves, and SGLang's version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mixquant_sglang import __version__
from mixquant_sglang.recipe import policy
from mixquant_sglang.recipe.schema import LayerRule, Recipe
from mixquant_sglang.recipe.select import Selection

_LEFT_OUT: dict[type, frozenset[str]] = {
    Recipe: frozenset(
        {
            *("name", "source", "description", "prefill_weights_at", "min_tokens_by"),
            "verify",  # compares and changes nothing
            *("prefill", "decode", "kernel"),  # in the selection, resolved
            "prefill_weights",  # a place; what lies there is ``ready_made``
            "prefill_rounding",  # which of them are taken, not how they serve
        }
    ),
    LayerRule: frozenset({"where", "optional"}),
    Selection: frozenset({"reason"}),
}


def fingerprint(recipe: Recipe, selection: Selection, *, ready_made: str = "", invariant: bool = False) -> str:
    """16 hexadecimal digits, or ``policy.BF16`` where no layer has a low precision in either phase.

    ``ready_made``: the identity of ready-made prefill weights (``ReadyMadeWeights.identity``).  ``invariant``: by
    kernels that are one for every number of rows, with numbers of their own."""
    if not selection.kernels:
        return policy.BF16
    facts = {"version": __version__, "recipe": _plain(recipe), "selection": _plain(selection), "ready": ready_made}
    return digest(facts | {"invariant": True} if invariant else facts)


def asked_digest(recipe: Recipe) -> str:
    """16 hexadecimal digits of what ``recipe`` asks, whatever the device: those of a prefill and of a decode server are
    equal where the two were given the same."""
    asked = {name: getattr(recipe, name) for name in ("prefill", "decode", "kernel")}
    return digest({"recipe": _plain(recipe), "asked": asked, "ready": bool(recipe.prefill_weights)})


def digest(facts: Any) -> str:
    """16 hexadecimal digits of JSON values; the order of keys does not matter."""
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
