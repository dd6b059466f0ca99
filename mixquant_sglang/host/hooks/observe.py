"""What users see: /server_info, /metrics, log lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixquant_sglang import __version__
from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.host.metrics import PrometheusSeries
from mixquant_sglang.passes.schedule import ScheduledPass
from mixquant_sglang.versions.dialect import dialect

_labels: Mapping[str, Any] | None = None


@handler
def add_internal_state(result: Any, scheduler: Any, *_args: Any) -> None:
    """Replicas answer in any order, so each says which it is."""
    run = runtime.current()
    if run is None:
        return
    replica = dialect().replica(scheduler)
    result.internal_state["mixquant"] = run.state() | ({} if replica is None else {"dp_rank": replica})


@handler
def attach_metrics(context: Any, *_args: Any, **_kwargs: Any) -> None:
    global _labels
    if context.collector is not None and context.current_scheduler_metrics_enabled:
        _labels = context.collector.labels
        publish_metrics()


def publish_metrics() -> None:
    """Once SGLang's labels are known and the model is loaded and proved, whichever comes last."""
    global _labels
    run = runtime.current()
    if run is None or run.lifecycle is None or run.lifecycle.loading or run.lifecycle.unproved or _labels is None:
        return
    series = PrometheusSeries(_labels)
    run.counters.attach(series)
    series.describe(
        version=__version__,
        recipe=run.recipe.name,
        kernel=",".join(f"{precision}:{kernel}" for precision, kernel in run.selection.kernels.items()) or "none",
        layers=run.precisions,
        extra_bytes=run.extra_weight_bytes,
    )
    _labels = None


@handler
def log_prefill(original: Callable[..., None], reporter: Any, *args: Any, **kwargs: Any) -> None:
    stats = kwargs.get("prefill_stats", args[1] if len(args) > 1 else None)
    scheduled: ScheduledPass | None = getattr(stats, "mixquant", None)
    if scheduled is None:
        return original(reporter, *args, **kwargs)
    rows = scheduled.tokens.get(("prefill", scheduled.precision), 0)
    label = reporter._graph_backend_label
    reporter._graph_backend_label = (
        f"#{scheduled.precision}-token: {rows}, #protected-row: {scheduled.protected_total}, {label}"
    )
    try:
        return original(reporter, *args, **kwargs)
    finally:
        reporter._graph_backend_label = label
