"""SGLang 0.5.17: server arguments resolve themselves as they are constructed, and hold what came of it.

The file of 0.5.18 too, whose two differences are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

# No DualGemm, and no sessions of weight updates.
HOOK_TARGETS: Mapping[str, str] = {
    "resolve_server_args": "sglang.srt.server_args.ServerArgs.__post_init__",
    "weights_from_distributed": (
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_distributed"
    ),
}


def fits() -> bool:
    from sglang.srt.server_args import ServerArgs

    return "__post_init__" in vars(ServerArgs)


def resolved(server_args: Any) -> Any:
    """Of some fields the record gets SGLang's decisions at the end (``materialize_declarations``), from when on the
    record alone is right."""
    if getattr(server_args, "_declarations_materialized", False):
        return server_args
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(server_args)


def resolution_finished(_server_args: Any) -> bool:
    """``__post_init__`` runs once a record."""
    return False


def prefill_graphs(model_runner: Any) -> Any:
    return model_runner.server_args.cuda_graph_config.prefill


def forward_method(op: Any) -> Callable[..., Any]:
    """``MultiPlatformOp`` looks it up when it is constructed.  Norms are handed ``post_residual_addition`` by
    position."""
    if op._forward_method is None:  # 0.5.18
        op._forward_method = op._resolve_forward_method()
    method: Callable[..., Any] = op._forward_method
    return method


def tensor_parallel(layer: Any) -> tuple[int, int]:
    """Attributes of the layer, which a replicated one has not."""
    return (int(layer.tp_rank), int(layer.tp_size)) if hasattr(layer, "tp_rank") else (0, 1)


def stored_pages_are_named() -> bool:
    """Their chain of hashes begins with the tokens (``mem_cache/utils.py``)."""
    return False


def tree_ignores_keys() -> bool:
    """The experimental radix tree in C++."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_EXPERIMENTAL_CPP_RADIX_TREE.get())


def multiplexes() -> bool:
    """``SchedulerMultiplexMixin`` reads ``gpu_id`` and ``tp_size`` of the scheduler, which keeps them in ``ps``."""
    return False


def replica(scheduler: Any) -> int | None:
    rank: int | None = scheduler.ps.dp_rank
    return rank


def set_first_chunk(req: Any, rows: int) -> None:
    req.set_extend_range(0, rows)


def autotune_logits() -> Mapping[str, bool]:
    from sglang.srt.model_executor.runner.flashinfer_autotune import flashinfer_autotune_context

    if "skip_logits" not in signature(flashinfer_autotune_context).parameters:  # 0.5.18
        return {"run_lm_head": True}
    return {"skip_logits": False}
