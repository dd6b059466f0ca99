"""The class that a model is loaded as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.versions import machine


@handler
def choose_architecture(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Chooses as for a BF16 model: for quantizations that it does not list, SGLang swaps Mixtral for a class whose
    experts are linears over all rows (``QuantMixtralForCausalLM``)."""
    if model_config.quantization != machine.NAME:
        return original(model_config, *args, **kwargs)
    model_config.quantization = None
    try:
        return original(model_config, *args, **kwargs)
    finally:
        model_config.quantization = machine.NAME
