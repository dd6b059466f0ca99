"""A short digest of what decides which KV a server's prefill writes.

Two servers whose prefill computes the same have the same one, wherever their recipes lie and whatever they are
called; all that prefill and decode in BF16 throughout have ``policy.BF16``.  It names KV (``policy.kv_name``) in the
radix cache and in stores that outlive the process.  Not in it: the BF16 checkpoint, by whose name such stores separate
servers themselves, and SGLang's version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mixquant_sglang import policy
from mixquant_sglang.kernels import Selection
from mixquant_sglang.recipe import Recipe

# Raise it when the same recipe comes to write other KV: another rounding, another set of protected rows.
NUMBERS = 1

# Fields of a recipe that say nothing about the numbers, or whose meaning is in the selection.  All others count.
_NOT_NUMBERS = {
    *("name", "source", "description", "verify", "prefill_weights_at"),
    *("prefill", "decode", "kernel", "layers", "prefill_weights"),
}


def fingerprint(recipe: Recipe, selection: Selection, *, bf16_below: int = 1, ready_made: str = "") -> str:
    """16 hexadecimal digits; ``ready_made``: the identity of ready-made prefill weights (``PrefillWeights.identity``).

    ``policy.BF16`` where no layer has a low precision in either phase.
    """
    if not selection.kernels:
        return policy.BF16
    facts: dict[str, Any] = {
        "numbers": NUMBERS,
        "selection": {"prefill": selection.prefill, "decode": selection.decode, "kernels": dict(selection.kernels)},
        "layers": [[rule.match, rule.prefill, rule.decode] for rule in recipe.layers],
        "bf16_below": bf16_below,
        "ready_made": ready_made,
    }
    for field in dataclasses.fields(recipe):
        if field.name not in _NOT_NUMBERS:
            facts[field.name] = getattr(recipe, field.name)
    return digest(facts)


def digest(facts: Mapping[str, Any] | Sequence[Any]) -> str:
    """Of JSON values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
