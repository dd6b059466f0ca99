"""Where SGLang multiplies by a linear's BF16 weight itself (``mixquant_sglang/layers/bypasses.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.layers.bypasses import left_to_sglang


@handler
def can_run_dual_gemm(original: Callable[..., bool], dual_gemm: Any, x: Any, gate_up_proj: Any) -> bool:
    return left_to_sglang(gate_up_proj, x) and original(dual_gemm, x, gate_up_proj)


@handler
def run_fused_a_gemm(original: Callable[..., Any], layer: Any, hidden_states: Any, **kwargs: Any) -> Any:
    if left_to_sglang(layer, hidden_states):
        return original(layer, hidden_states, **kwargs)
    return layer(hidden_states)[0]
