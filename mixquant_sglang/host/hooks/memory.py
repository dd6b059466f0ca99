"""A start that runs out of memory ends with what the recipe takes and what would fit, not with a traceback alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.host.shortage import explain


@handler
def load_within_memory(original: Callable[..., Any], model_runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's loading, in which the copies are packed too."""
    try:
        return original(model_runner, *args, **kwargs)
    except torch.OutOfMemoryError as error:
        run = runtime.current()
        if run is None or not run.selection.kernels:
            raise
        with refusing():
            first = str(error).splitlines()[0]
            raise MixQuantError(f"out of memory while loading: {first}; {explain(run, model_runner)}") from error


@handler
def size_pool(original: Callable[..., Any], config: Any) -> Any:
    """Around the check of how many tokens the KV pool gets, beside the packed copies."""
    run = runtime.current()
    if run is not None and run.shortage is not None and run.selection.kernels and config.max_total_num_tokens <= 0:
        with refusing():
            raise MixQuantError(f"no memory is left for the KV cache: {run.shortage()}")
    return original(config)
