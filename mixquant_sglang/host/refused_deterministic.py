"""What mixquant refuses with ``--enable-deterministic-inference`` of recipes that have low layers.

SGLang promises a request the same tokens whatever else is in its batch.  What keeps that promise here:
``host/deterministic.py``.
"""

from __future__ import annotations

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import compact
from mixquant_sglang.host.refusal import Refusal, is_set
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.versions import machine

FLAG = "--enable-deterministic-inference"
_WITH = " with deterministic inference"
_OR = f"use recipe bf16, or leave out {FLAG} and --rl-on-policy-target, which turns it on"
_UNTESTED = "it has not been tested together with deterministic inference in low precision"

DETERMINISTIC: tuple[Refusal, ...] = (
    Refusal(
        "disable_radix_cache",
        "a radix cache" + _WITH,
        lambda v: not v,
        "rows that were generated, or that ended a prompt, are BF16 where they are cached and low where they are "
        "prefilled anew, so an answer depends on what was served before",
        f"pass --disable-radix-cache; or {_OR}",
        low=True,
        deterministic=True,
    ),
    Refusal(
        "device",
        "--device cpu" + _WITH,
        lambda v: str(v).partition(":")[0] == "cpu",
        "SGLang's own products that do not depend on the number of rows are for GPUs",
        _OR,
        low=True,
        deterministic=True,
    ),
    Refusal(
        "enable_deterministic_inference",
        FLAG + " with DP attention",
        is_set,
        "the number of rows that a rank computes follows the batches of the others, and " + _UNTESTED,
        _OR,
        low=True,
        gathered=True,
    ),
    *(
        Refusal(field, f"--{field.replace('_', '-')}{_WITH}", is_set, _UNTESTED, _OR, low=True, deterministic=True)
        for field in ("disaggregation_mode", "speculative_algorithm", "enable_lora", "lora_paths")
    ),
)


def check(recipe: Recipe, selection: Selection) -> None:
    """Raises ``MixQuantError`` for what ``recipe`` comes to that does not keep the promise."""
    if not machine.deterministic() or not selection.kernels:
        return
    if selection.kernels.get("nvfp4") == "native":
        raise MixQuantError(
            f"recipe {recipe.name} comes to native nvfp4 here, which does not go with {FLAG}: FlashInfer chooses its "
            f"GEMM by the number of rows; use recipe fp8, or 'kernel: emulated' for accuracy work; or {_OR}"
        )
    if recipe.attention != "bf16":
        raise MixQuantError(
            f"recipe {recipe.name} has attention in {recipe.attention}, which does not go with {FLAG}: its scales "
            f"come from the rows of a chunk; leave 'prefill: {{attention: ...}}' out; or {_OR}"
        )
    if compact.precisions(recipe):
        raise MixQuantError(
            f"recipe {recipe.name} decodes in {' and '.join(compact.precisions(recipe))}, which does not go with "
            f"{FLAG}: its kernels for few and for many rows sum in other orders; use a recipe that decodes in bf16; "
            f"or {_OR}"
        )
