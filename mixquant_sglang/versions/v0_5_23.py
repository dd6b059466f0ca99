"""SGLang 0.5.23: server arguments stay as they were given; what came of them is kept beside the record.

``resolve_once`` came with 0.5.19.  What came later is asked for, and 0.5.17's way is taken where it is not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixquant_sglang.versions import v0_5_17

HOOK_TARGETS: Mapping[str, str] = {
    "resolve_server_args": "sglang.srt.server_args.ServerArgs.resolve_once",
    "can_run_dual_gemm": "sglang.srt.layers.dual_gemm.DualGemm.can_run",
    "weights_from_distributed": (
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.load_weights_from_distributed"
    ),
    "weights_begin": (
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.begin_weight_update"
    ),
    "weights_end": ("sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.end_weight_update"),
    "session_ended": (
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.end_weight_update"
    ),
}


def fits() -> bool:
    from sglang.srt.server_args import ServerArgs

    return hasattr(ServerArgs, "resolve_once")


def resolved(server_args: Any) -> Any:
    """SGLang never writes its decisions to the record."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(server_args)


def resolution_finished(server_args: Any) -> bool:
    """``resolve_once`` is called again wherever the arguments arrive."""
    return bool(getattr(server_args, "_resolution_finished", False))


def prefill_graphs(_model_runner: Any) -> Any:
    from sglang.srt.runtime_context import get_exec

    return get_exec().graph.cuda_graph_config.prefill


def forward_method(op: Any) -> Callable[..., Any]:
    """``BaseFusedOp`` looks it up when it is first called.  Norms are handed ``post_residual_addition`` by name."""
    if op._forward_method is None:
        op._forward_method = op._resolve_forward_method()
    method: Callable[..., Any] = op._forward_method
    return method


def tensor_parallel(layer: Any) -> tuple[int, int]:
    """A group of the layer, which is None where it is replicated."""
    if hasattr(layer, "tp_rank"):  # up to 0.5.21
        return v0_5_17.tensor_parallel(layer)
    group = getattr(layer, "tp_group", None)
    return (0, 1) if group is None else (int(group.rank_in_group), int(group.world_size))


def stored_pages_are_named() -> bool:
    """Their chain of hashes begins with ``extra_key`` (``mem_cache/utils.py``)."""
    from sglang.srt.mem_cache import utils

    seed = getattr(utils, "storage_namespace_seed", None)
    if seed is None:  # 0.5.19
        return v0_5_17.stored_pages_are_named()
    return bool(seed("a", None) != seed("b", None))


def tree_ignores_keys() -> bool:
    """The radix tree in C++ is gone."""
    from sglang.srt.environ import envs

    return hasattr(envs, "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE") and v0_5_17.tree_ignores_keys()  # up to 0.5.20


def multiplexes() -> bool:
    """``SchedulerMultiplexMixin`` asks the runtime context for the GPU."""
    from sglang.srt.multiplex import multiplexing_mixin

    return hasattr(multiplexing_mixin, "get_device") or v0_5_17.multiplexes()


def replica(scheduler: Any) -> int | None:
    if hasattr(scheduler, "ps"):  # before SGLang kept it in the runtime context
        return v0_5_17.replica(scheduler)
    from sglang.srt.runtime_context import get_parallel

    rank: int | None = get_parallel().dp_rank
    return rank


def set_first_chunk(req: Any, rows: int) -> None:
    if hasattr(req, "set_extend_range"):  # up to 0.5.21
        v0_5_17.set_first_chunk(req, rows)
    else:
        req.extend_end = rows


def autotune_logits() -> Mapping[str, bool]:
    return {"run_lm_head": True}
