"""What mixquant refuses together with DP attention, where ranks attend to batches of their own."""

from __future__ import annotations

from mixquant_sglang.host.refusal import Refusal, is_set, several

_WITH_DP = " with DP attention"
_NOT_GATHERED = "it has not been tested together with DP attention"
_REPLICAS = "use --dp-size without DP attention, or --tp-size"

GATHERED: tuple[Refusal, ...] = (
    Refusal(
        "cuda_graph_config.prefill.backend",
        "prefill CUDA graphs" + _WITH_DP,
        lambda v: v != "disabled",
        "a rank whose pass no graph computes would do without, while the others replay theirs and wait for it",
        "leave --cuda-graph-backend-prefill out, or pass --disable-prefill-cuda-graph",
        ("cuda",),
        low=True,
        gathered=True,
    ),
    Refusal(
        "enable_dp_attention_local_control_broadcast",
        "--enable-dp-attention-local-control-broadcast" + _WITH_DP,
        is_set,
        "ranks would take up a weight update in different steps, and packing the new weights waits for all of them",
        "leave it out",
        low=True,
        gathered=True,
    ),
    Refusal("pp_size", "--pp-size > 1" + _WITH_DP, several, _NOT_GATHERED, _REPLICAS, low=True, gathered=True),
    Refusal(
        "speculative_algorithm",
        "--speculative-algorithm" + _WITH_DP,
        is_set,
        _NOT_GATHERED,
        _REPLICAS,
        low=True,
        gathered=True,
    ),
    Refusal("disaggregation_mode", "--disaggregation-mode" + _WITH_DP, is_set, _NOT_GATHERED, _REPLICAS, gathered=True),
    Refusal("enable_lora", "--enable-lora" + _WITH_DP, is_set, _NOT_GATHERED, _REPLICAS, low=True, gathered=True),
    Refusal("lora_paths", "--lora-paths" + _WITH_DP, is_set, _NOT_GATHERED, _REPLICAS, low=True, gathered=True),
)
