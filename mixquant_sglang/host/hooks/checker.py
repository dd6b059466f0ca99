"""What reads or overwrites SGLang's own parameters past its weight updates: /weights_checker, /get_weights_by_name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import compact, runtime
from mixquant_sglang.host.hooks import launcher
from mixquant_sglang.host.hooks.registry import handler


@handler
def check_weights(original: Callable[..., Any], model_runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses all of it where some weights are not kept, on every rank alike and before SGLang overwrites the others;
    else packs anew what ``reset_tensors`` overwrote."""
    run = runtime.serving(model_runner)
    if run is None:
        return original(model_runner, *args, **kwargs)
    if compact.precisions(run.recipe):
        raise MixQuantError(
            f"/weights_checker: recipe {run.recipe.name} keeps no BF16 weights of what it packs, so there is nothing "
            "to compare or to overwrite, and nothing was changed; use a recipe that decodes in bf16"
        )
    if "reset_tensors" not in (*args, kwargs.get("action")):
        return original(model_runner, *args, **kwargs)
    run.weights.hold("the weights are being overwritten")
    try:
        return original(model_runner, *args, **kwargs)
    finally:
        run.weights.written()


@handler
async def weights_by_name(original: Callable[..., Awaitable[Any]], manager: Any, obj: Any, *args: Any) -> Any:
    """Raises ``MixQuantError`` where SGLang has no numbers to give, and the recipe may be why."""
    found = await original(manager, obj, *args)
    recipe = launcher.asked_recipe()
    none = found is None or (isinstance(found, list) and any(each is None for each in found))
    if none and recipe is not None and compact.precisions(recipe):
        raise MixQuantError(
            f"/get_weights_by_name: no numbers of {obj.name}: recipe {recipe.name} keeps no BF16 weights of the "
            "linears and experts that it packs; others SGLang gives, of models that can (the log says what else "
            "it may have been)"
        )
    return found
