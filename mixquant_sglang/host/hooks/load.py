"""Once the model is loaded, once it has an attention back end, and once it can run."""

from __future__ import annotations

from typing import Any

from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks.observe import publish_metrics
from mixquant_sglang.host.hooks.registry import handler


@handler
def finish_load(_result: None, model_runner: Any) -> None:
    run = runtime.serving(model_runner)
    if run is not None and run.lifecycle is not None and run.lifecycle.loading:
        run.lifecycle.finish_load(model_runner)
        publish_metrics()


@handler
def finish_attention(_result: None, model_runner: Any) -> None:
    run = runtime.serving(model_runner)
    if run is not None and run.lifecycle is not None:
        run.lifecycle.finish_attention(model_runner)


@handler
def prove_model(*, model_runner: Any, eager_runner: Any, **_kwargs: Any) -> None:
    run = runtime.serving(model_runner)
    if run is not None and run.lifecycle is not None and run.lifecycle.unproved:
        run.lifecycle.prove(model_runner, eager_runner)
        publish_metrics()
