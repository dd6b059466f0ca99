"""What SGLang's experts are: read from the configuration of their layer and from the router beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.moe.topk import TopK

from mixquant_sglang.kernels.experts.base import Form, Masters
from mixquant_sglang.weights.ready_made_experts import ExpertShare


def choices_of(layer: torch.nn.Module, model: torch.nn.Module) -> int | None:
    """How many experts a token takes: as the layer was told, or (Llama-4) as the router that stands beside it in
    ``model`` was; None if neither says so."""
    told: int | None = layer.moe_runner_config.top_k  # type: ignore[assignment,union-attr]
    if told is not None:
        return told
    beside = [parent for parent in model.modules() if layer in {*parent.children()}]
    routers = [child for parent in beside for child in parent.children() if isinstance(child, TopK)]
    return routers[0].topk_config.top_k if routers else None


def form_of(config: Any) -> Form | str:
    """What the experts of SGLang's ``MoeRunnerConfig`` compute, or why ours cannot."""
    if not config.is_gated or config.no_combine or config.swiglu_limit is not None:
        what = "a clamp of DeepSeek-V4" if config.is_gated and not config.no_combine else "no gate or no sum"
        return f"experts with {what} are not known here"
    if config.activation not in ("silu", "gelu"):
        return f"experts with activation {config.activation} are not known here"
    form = Form(
        config.activation,
        weighted_input=bool(config.apply_router_weight_on_input),
        scaling=1.0 if config.routed_scaling_factor is None else float(config.routed_scaling_factor),
    )
    alpha, limit = config.gemm1_alpha, config.gemm1_clamp_limit
    if alpha is None and limit is None:
        return form
    if config.activation != "silu" or alpha is None or limit is None:
        return "experts whose activation has a limit alone are not known here"
    interleaved = bool(config.gate_up_interleaved)
    return replace(form, activation="swiglu_oai", interleaved=interleaved, alpha=float(alpha), limit=float(limit))


def share_of(layer: Any, masters: Masters) -> ExpertShare:
    """What this rank holds of the FusedMoE ``layer``; as ``FusedMoE._map_global_expert_id_to_local_expert_id``."""
    shared: int = layer.num_fused_shared_experts
    held, hidden, inner = masters.w2.shape
    first = layer.moe_ep_rank * (held - shared)
    local = tuple(range(first, first + held - shared))
    return ExpertShare(layer.num_experts - shared, local, inner, hidden, layer.moe_tp_rank, layer.moe_tp_size, shared)
