"""A prefill and a decode server: what the decode server keeps of a recipe, and whether the two fit.

No torch, no SGLang.  The prefill server says what it is (``Identity``) where SGLang's decode servers ask for its
ranks; a decode server with mixquant takes keys and values from a prefill server that says the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mixquant_sglang import __version__
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import policy
from mixquant_sglang.recipe.fingerprint import asked_digest, digest, fingerprint
from mixquant_sglang.recipe.schema import Recipe
from mixquant_sglang.recipe.select import Device, Selection, select

PREFILL, DECODE = "prefill", "decode"
PROMPT = (
    "mixquant_prompt"  # in custom_params: how many of the tokens that are sent are prompt; the others were generated
)
NO_COPIES = "a decode server keeps the copies that it decodes with, and no others: prompts are prefilled elsewhere"


def of_decode_server(recipe: Recipe) -> Recipe:
    """``recipe`` with each layer's decode precision in prefill too, so that nothing is packed for prompts."""
    rules = tuple(replace(rule, prefill=rule.decode) for rule in recipe.layers)
    low = {recipe.decode, *(rule.decode for rule in rules)}
    weights = (recipe.prefill_weights, recipe.prefill_weights_at) if "nvfp4" in low else ("", "")
    return replace(
        recipe,
        prefill=recipe.decode,
        min_tokens=1,
        layers=rules,
        prefill_weights=weights[0],
        prefill_weights_at=weights[1],
        prefill_rounding=recipe.prefill_rounding if weights[0] else "nearest",
    )


def select_for(recipe: Recipe, device: Device, mode: str) -> tuple[Recipe, Selection]:
    """What a server of ``mode`` ("" for one that does both phases) runs of ``recipe`` on ``device``."""
    if mode != DECODE:
        return recipe, select(recipe, device)
    own = of_decode_server(recipe)
    return own, replace(select(own, device), reason=NO_COPIES)


def kv_fingerprint(recipe: Recipe, device: Device, *, ready_made: str = "") -> str:
    """What a decode server names keys and values by: as a prefill server of ``recipe`` on its kind of device would.

    A recipe that this device could not prefill by has a name that no prefill server has."""
    try:
        return fingerprint(recipe, select(recipe, device), ready_made=ready_made)
    except MixQuantError:
        return digest({"decode server": asked_digest(recipe)})


@dataclass(frozen=True)
class Identity:
    """``recipe``: its name, for messages; ``asked``: the digest of what it asks, whatever the device; ``fingerprint``:
    of the keys and values that it makes; ``model``: of the names of its parameters; ``weights``: of samples of
    them, empty once they were updated."""

    version: str
    recipe: str
    asked: str
    fingerprint: str
    model: str
    weights: str = ""

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Identity | None:
        """None for what no server of ours sends."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(found, Mapping) or any(not isinstance(found.get(name), str) for name in names):
            return None
        return cls(**{name: found[name] for name in names})


def identity(recipe: Recipe, made: str, *, model: str, weights: str) -> Identity:
    """Of this server, whose keys and values ``made`` names; ``recipe`` as it was asked for."""
    return Identity(__version__, recipe.name, asked_digest(recipe), made, model, weights)


def misfit(ours: Identity, theirs: Identity | None, kept: str = "") -> str | None:
    """Why a decode server ``ours`` takes nothing from the prefill server ``theirs``; None if it does.

    ``theirs`` None: one without mixquant.  ``kept``: the fingerprint of what ours keeps for later requests."""
    if theirs is None:
        if ours.fingerprint == policy.BF16:
            return None
        return (
            f"the decode server has recipe {ours.recipe} and the prefill server runs without mixquant; start both with "
            "--quantization mixquant and one recipe, or the decode server without"
        )
    if ours.version != theirs.version:
        return f"the decode server is mixquant {ours.version} and the prefill server {theirs.version}; use one version"
    if ours.asked != theirs.asked:
        return (
            f"the decode server has recipe {ours.recipe} ({ours.asked}) and the prefill server {theirs.recipe} "
            f"({theirs.asked}); start both with one recipe, or the decode server without mixquant"
        )
    if ours.model != theirs.model:
        return "the decode server serves a model of other layers than the prefill server; give both one checkpoint"
    if ours.weights and theirs.weights and ours.weights != theirs.weights:
        return "the decode server has other weights than the prefill server; give both one checkpoint"
    if kept and kept != theirs.fingerprint:
        return (
            f"the decode server keeps keys and values that {kept} made, and those of this prefill server are "
            f"{theirs.fingerprint}; use prefill servers of one kind of GPU, or start the decode server without "
            "--disaggregation-decode-enable-radix-cache and --disaggregation-decode-enable-offload-kvcache"
        )
    return None
