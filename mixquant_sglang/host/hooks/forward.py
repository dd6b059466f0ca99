"""The rows of a batch, and the pass that they take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.passes.running import MASTER_PASS, Pass, current, replace_current, role_of, scope
from mixquant_sglang.passes.schedule import ScheduledPass
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.versions.requests import reads_all_rows, request_rows

logger = logging.getLogger(__name__)

_SCHEDULED = "_mixquant_pass"  # attribute of the ForwardBatch between init_new and ModelRunner.forward


def scheduled_of(forward_batch: Any) -> ScheduledPass | None:
    """What ``schedule_batch`` found for the batch; None for one that it did not see."""
    return getattr(forward_batch, _SCHEDULED, None)


@handler
def schedule_batch(forward_batch: Any, _cls: type, batch: Any, model_runner: Any, **_kwargs: Any) -> None:
    run = runtime.serving(model_runner)
    if run is None or _role_of(forward_batch.forward_mode) is not Role.PROMPT:
        return
    run.weights.refresh()
    requests = request_rows(forward_batch, batch, lambda req: getattr(req, "mixquant_bf16", False), prompt_tokens)
    reads_all = run.schedule.prunes and reads_all_rows(forward_batch)
    scheduled = run.schedule.prefill(requests, torch.device(model_runner.device), reads_all=reads_all)
    setattr(forward_batch, _SCHEDULED, scheduled)
    if batch.prefill_stats is not None:
        batch.prefill_stats.mixquant = scheduled


def prompt_tokens(req: Any) -> int:
    """A prefill server gets generated tokens to prefill again as if they were of the prompt."""
    told: int | None = getattr(req, "mixquant_prompt", None)
    return len(req.origin_input_ids) if told is None else told


@cache
def _role_of(mode: Any) -> Role:
    return role_of(mode.name)


@handler
def run_pass(original: Callable[..., Any], model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    run = runtime.serving(model_runner)
    if run is None:  # outside of any scope, so in BF16
        return original(model_runner, forward_batch, *args, **kwargs)
    run.weights.refresh()
    mode = forward_batch.forward_mode
    role = _role_of(mode)
    if role is not Role.PROMPT:
        if mode.name != "IDLE":
            run.count_decode(len(forward_batch.input_ids), role)
        if not run.weights.current:
            with scope(MASTER_PASS):
                return original(model_runner, forward_batch, *args, **kwargs)
        if role is Role.DECODE:  # as outside of any scope
            return original(model_runner, forward_batch, *args, **kwargs)
        with scope(Pass(role)):
            return original(model_runner, forward_batch, *args, **kwargs)
    scheduled = scheduled_of(forward_batch)
    if scheduled is None:
        raise RuntimeError(f"mixquant: a {mode.name} batch reached the model without the facts of its requests")
    if not forward_batch.split_index:  # SPLIT_PREFILL runs one batch in several calls
        run.count_prefill(scheduled)
    elif not run.weights.current and not scheduled.running.from_masters:  # an update came in between them
        logger.warning(
            "mixquant: the weights changed after %d layers of a prefill pass of %d rows: the others run from the BF16 "
            "masters, and count as before",
            forward_batch.split_index,
            len(forward_batch.input_ids),
        )
        scheduled = replace(scheduled, running=MASTER_PASS)  # to its end, whatever comes of the update
        setattr(forward_batch, _SCHEDULED, scheduled)
    with scope(scheduled.running):
        return original(model_runner, forward_batch, *args, **kwargs)


@handler
def pad_rows(_result: None, forward_batch: Any, model_runner: Any) -> None:
    """With DP attention SGLang adds rows, so that those of all ranks can be gathered, once the pass has begun."""
    run, running = runtime.serving(model_runner), current()
    if run is not None and running.tokens is not None:
        replace_current(run.schedule.padded(running, len(forward_batch.input_ids)))
