"""Formats of the KV cache, page sizes and attention back ends: what each pair of servers of them must show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROMPTS = [150, 61]  # of one prefill pass; the last row of each is protected
STEPS = 4
KINDS: Mapping[str, Mapping[str, Any]] = {"stock": {}, "bf16": {"recipe": "bf16"}, "auto": {"recipe": "auto"}}


def cases(model: str, args: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of ``run_model``: stock, the control, and the default recipe, all with SGLang's arguments ``args``."""
    base = {"model": model, "prompts": PROMPTS, "steps": STEPS, "args": {**args}, "survive": True}
    return {kind: {**base, **more, **({"policy": True} if kind == "auto" else {})} for kind, more in KINDS.items()}


def ended(result: Mapping[str, Any]) -> str:
    """Why a case gave nothing, in one line; empty if it ran."""
    return str(result.get("error") or result.get("refused") or "").replace("\n", " ")


def problems(ran: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is not as it must be.  Where stock SGLang does not run, the others have to end too."""
    ends = {kind: ended(result) for kind, result in ran.items()}
    if ends["stock"]:
        return [f"{kind} runs, but not stock: {ends['stock']}" for kind, why in ends.items() if not why]
    found = [f"{kind}: {why}" for kind, why in ends.items() if why]
    if found:
        return found
    stock, auto = ran["stock"], ran["auto"]
    rows, low = sum(PROMPTS), auto["state"]["precision"]["prefill"]
    prefill = {low: rows - len(PROMPTS), "bf16": len(PROMPTS)}
    checks = {
        "bits of recipe bf16": (ran["bf16"]["bits"], stock["bits"]),
        "a BF16 prefill is stock's": (auto["policy"]["bits"], stock["bits"]),
        "prefill is another computation": (auto["bits"][0] != stock["bits"][0], True),
        "rows of prefill": (auto["after"]["tokens"]["prefill"], prefill),
        "rows of decode": (auto["after"]["tokens"]["decode"], {"bf16": STEPS * len(PROMPTS)}),
        "protected rows": (auto["after"]["protected_rows"], len(PROMPTS)),
        "proof": (auto["after"].get("unproven"), None),
    }
    return [f"{what}: {got}, not {wanted}" for what, (got, wanted) in checks.items() if got != wanted]
