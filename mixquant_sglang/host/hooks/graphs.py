"""Prefill CUDA graphs: what they are captured with, which passes may replay them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks.forward import scheduled_of
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.passes.running import scope
from mixquant_sglang.versions.graphs import add_prefill_graphs, prefill_graph_of


@handler
def size_prefill_graphs(*_args: Any, model_runner: Any, **_kwargs: Any) -> None:
    """So that the largest pass that ``min_tokens`` keeps in BF16 does not share a graph with low ones; and one row, a
    turn of one new token or a full cache hit, has one: SGLang pads no pass to more than twice its rows, and has four in
    its smallest graph."""
    run = runtime.serving(model_runner)
    if run is not None and run.graphs.most_bf16_rows:
        add_prefill_graphs(model_runner, (1, run.graphs.most_bf16_rows))


@handler
def capture_prefill(
    original: Callable[..., Any], runner: Any, forward_batch: Any, num_tokens: int, *args: Any, **kwargs: Any
) -> Any:
    run = runtime.serving(runner.model_runner)
    if run is None:
        return original(runner, forward_batch, num_tokens, *args, **kwargs)
    backend = str(getattr(runner.prefill_backend_name, "value", runner.prefill_backend_name))
    if run.schedule.split and backend != "breakable":
        raise SystemExit(
            f"mixquant: the prefill CUDA graph backend is {backend}; row protection is tested with breakable graphs "
            "and without: pass --cuda-graph-backend-prefill breakable (or disabled)"
        )
    if run.schedule.local:
        raise SystemExit("mixquant: prefill CUDA graphs do not go with DP attention: pass --disable-prefill-cuda-graph")
    run.graphs.log(runner.capture_num_tokens)
    device = torch.device(runner.model_runner.device)
    with scope(run.graphs.captured_pass(num_tokens, runner.max_num_tokens, device)):
        return original(runner, forward_batch, num_tokens, *args, **kwargs)


@handler
def can_replay_prefill(original: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
    if not original(runner, forward_batch):
        return False
    run = runtime.serving(runner.model_runner)
    if run is None:
        return True
    if not run.selection.kernels:  # all is SGLang's, and ranks with rows of their own must come to one answer
        return True
    scheduled = scheduled_of(forward_batch)
    # SGLang also asks for modes that are no prefill to us and were not scheduled: none of them was captured.
    return scheduled is not None and run.graphs.can_replay(
        scheduled, prefill_graph_of(runner, len(forward_batch.input_ids))
    )


@handler
def can_replay_decode(original: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
    if not original(runner, forward_batch):
        return False
    run = runtime.serving(runner.model_runner)
    return run is None or run.graphs.can_replay_decode()


@handler
def load_prefill_rows(runner: Any, forward_batch: Any, **_kwargs: Any) -> None:
    run = runtime.serving(runner.model_runner)
    if run is not None and run.selection.kernels:
        scheduled = scheduled_of(forward_batch)
        assert scheduled is not None, "a prefill graph is replayed for a batch without the facts of its requests"
        run.graphs.load(scheduled)
