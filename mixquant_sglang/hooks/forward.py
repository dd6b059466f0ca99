"""The rows of a batch, and the pass that they take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from mixquant_sglang import compat, phase, runtime
from mixquant_sglang.hooks.table import handler
from mixquant_sglang.phase import Phase
from mixquant_sglang.runtime import PassPlan

_PLAN = "_mixquant_plan"  # attribute of the ForwardBatch between init_new and ModelRunner.forward


def plan_of(forward_batch: Any) -> PassPlan | None:
    """What ``plan_batch`` found for the batch; None for one that it did not see."""
    return getattr(forward_batch, _PLAN, None)


@handler
def plan_batch(forward_batch: Any, _cls: type, batch: Any, model_runner: Any, **_kwargs: Any) -> None:
    run = runtime.current()
    if run is None or _phase_of(forward_batch.forward_mode) is Phase.DECODE:
        return
    run.weights.refresh()
    requests = compat.request_rows(forward_batch, batch, lambda req: getattr(req, "mixquant_bf16", False))
    reads_all = run.prunes and compat.reads_all_rows(forward_batch)
    plan = run.plan_prefill(requests, torch.device(model_runner.device), reads_all=reads_all)
    setattr(forward_batch, _PLAN, plan)
    if batch.prefill_stats is not None:
        batch.prefill_stats.mixquant = plan


@cache
def _phase_of(mode: Any) -> Phase:
    return phase.phase_of(mode.name)


@handler
def run_pass(original: Callable[..., Any], model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    run = runtime.current()
    if run is None:
        return original(model_runner, forward_batch, *args, **kwargs)
    run.weights.refresh()
    mode = forward_batch.forward_mode
    if _phase_of(mode) is Phase.DECODE:
        # The decode column holds outside of any scope.
        if mode.name != "IDLE":
            run.count_decode(len(forward_batch.input_ids))
        if not run.weights.current:
            with phase.scope(phase.MASTER_PASS):
                return original(model_runner, forward_batch, *args, **kwargs)
        return original(model_runner, forward_batch, *args, **kwargs)
    plan = plan_of(forward_batch)
    if plan is None:
        raise RuntimeError(f"mixquant: a {mode.name} batch reached the model without the facts of its requests")
    if not forward_batch.split_index:  # SPLIT_PREFILL runs one batch in several calls
        run.count_prefill(plan)
    with phase.scope(plan.running):
        return original(model_runner, forward_batch, *args, **kwargs)
