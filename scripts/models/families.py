"""Families of models and the smallest shapes of each that SGLang's kernels take: data for ``make_family_models``.

K of each linear of the blocks is a multiple of 128, so that every precision takes it; heads, latent ranks and states of
linear attention have the sizes that attention kernels are built for.  Special tokens have ids from 1000 on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB, HIDDEN, INNER, EXPERTS = 1024, 256, 384, 8
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": 1000,
    "eos_token_id": 1001,
    "pad_token_id": 1002,
}
HEAD = {"head_dim": 64}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PARTIAL = {**ROPE, "partial_rotary_factor": 0.5}
MROPE = {**ROPE, "mrope_section": [8, 12, 12]}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}

# The names of experts' sizes differ from family to family; these are the most usual.
ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 128}
SHARED = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
GATED_DELTA = {
    **HEAD,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 2,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
}
GATED_DELTA_MROPE = {
    **GATED_DELTA,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
GEMMA4 = {
    **HEAD,
    **SLIDING,
    "global_head_dim": 128,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "moe_intermediate_size": 128,  # SGLang divides by it on a CPU, of dense models too
}

IMAGES = {
    "image_token_id": 1010,
    "video_token_id": 1011,
    "vision_start_token_id": 1012,
    "vision_end_token_id": 1013,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
    "initializer_range": 0.1,
}
QWEN3_VISION = {**QWEN_VISION, "patch_size": 16, "num_position_embeddings": 64}
QWEN3_5_VISION = {**QWEN3_VISION, "deepstack_visual_indexes": []}
SIGLIP = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA4_VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "position_embedding_size": 64,
}
GEMMA4_TOKENS = {
    **{"boi_token_id": 1012, "eoi_token_id": 1013, "image_token_id": 1010, "video_token_id": 1011},
    **{"boa_token_id": 1014, "eoa_token_index": 1015, "audio_token_id": 1016},
}


@dataclass(frozen=True)
class Family:
    """``model`` and ``config``: classes of transformers.  ``text``: what differs from ``TEXT``; with ``whole`` it is
    the ``text_config`` of a model of several modalities, whose other fields ``whole`` are.  Where checkpoints differ
    from what transformers saves: ``written`` are fields of config.json, ``extra`` shapes of tensors that its class
    lacks or leaves at zero, ``renamed`` a part of names and what stands there, ``transposed`` ends of names,
    ``indexed`` that the file of weights has an index beside it, where SGLang looks for a tower."""

    model: str
    config: str
    text: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] | None = None
    written: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    renamed: tuple[str, str] | None = None
    transposed: tuple[str, ...] = ()
    indexed: bool = False


def _row(name: str, *text: dict[str, Any], **more: Any) -> Family:
    merged = {key: value for part in text for key, value in part.items()}
    return Family(f"{name}ForCausalLM", f"{name}Config", merged, **more)


def _images(name: str, *text: dict[str, Any], **more: Any) -> Family:
    merged = {key: value for part in text for key, value in part.items()}
    return Family(f"{name}ForConditionalGeneration", f"{name}Config", merged, **more)


FAMILIES: dict[str, Family] = {
    # dense
    "llama": _row("Llama", HEAD),
    "mistral": _row("Mistral", HEAD, {"sliding_window": None}),
    "qwen2": _row("Qwen2"),
    "qwen3": _row("Qwen3", HEAD),
    "phi": _row("Phi", {"num_key_value_heads": 4, "intermediate_size": 4 * HIDDEN, "rope_parameters": PARTIAL}),
    "phi3": _row("Phi3"),
    "olmo2": _row("Olmo2"),
    "olmo3": _row("Olmo3", SLIDING, written={"rope_theta": 10000.0, "rope_scaling": ROPE}),
    "granite": _row("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.125, "residual_multiplier": 0.5}),
    "cohere": _row("Cohere", {"use_qk_norm": True, "tie_word_embeddings": True}),
    "cohere2": _row("Cohere2", SLIDING, HEAD, {"tie_word_embeddings": True}),
    "glm4": _row("Glm4", HEAD, {"rope_parameters": PARTIAL}),
    "stablelm": _row("StableLm", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}}),
    "gemma3_text": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**HEAD, **SLIDING, "query_pre_attn_scalar": 64}),
    # experts
    "mixtral": _row("Mixtral", HEAD, LOCAL, {"sliding_window": None}),
    "qwen2_moe": _row("Qwen2Moe", ROUTED, {"shared_expert_intermediate_size": 256, "decoder_sparse_step": 1}),
    "qwen3_moe": _row("Qwen3Moe", HEAD, ROUTED),
    "phimoe": _row("Phimoe", LOCAL, written={"architectures": ["PhiMoEForCausalLM"]}),
    "glm4_moe": _row("Glm4Moe", HEAD, SHARED, {"use_qk_norm": True, "rope_parameters": PARTIAL}),
    "granitemoe": _row("GraniteMoe", LOCAL, {"logits_scaling": 4.0, "attention_multiplier": 0.125}),
    "gpt_oss": _row("GptOss", HEAD, LOCAL, SLIDING, {"swiglu_limit": 7.0}),
    "llama4": _images(
        "Llama4",
        HEAD,
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size": 128,
            "intermediate_size_mlp": 256,
        },
        {"interleave_moe_layer_step": 2, "attention_chunk_size": 1024, "no_rope_layers": [1, 0]},
        whole={
            "vision_config": {
                **{"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2},
                **{"image_size": 56, "patch_size": 14, "vision_output_dim": 256},
                **{"projector_input_dim": 256, "projector_output_dim": 256},
            },
            "image_token_index": 1010,
        },
        indexed=True,
    ),
    # latent attention
    "deepseek_v2": _row(
        "DeepseekV2", SHARED, LATENT, {"q_lora_rank": None, "rope_parameters": YARN, "scoring_func": "softmax"}
    ),
    "deepseek_v3": _row(
        "DeepseekV3",
        SHARED,
        LATENT,
        {"rope_parameters": YARN, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    ),
    "glm4_moe_lite": _row("Glm4MoeLite", SHARED, LATENT, {"rope_parameters": ROPE}),
    # hybrids
    "qwen3_next": _row("Qwen3Next", GATED_DELTA, ROUTED, {"shared_expert_intermediate_size": 256}),
    "qwen3_5": _images("Qwen3_5", GATED_DELTA_MROPE, whole={**IMAGES, "vision_config": QWEN3_5_VISION}),
    "qwen3_5_moe": _images(
        "Qwen3_5Moe",
        GATED_DELTA_MROPE,
        ROUTED,
        {"shared_expert_intermediate_size": 256},
        whole={**IMAGES, "vision_config": QWEN3_5_VISION},
    ),
    # images
    "gemma3_mm": _images(
        "Gemma3",
        HEAD,
        SLIDING,
        {"query_pre_attn_scalar": 64},
        whole={
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            **{"boi_token_index": 1012, "eoi_token_index": 1013, "image_token_index": 1010},
        },
        renamed=("vision_tower.", "vision_tower.vision_model."),
        # transformers begins with zeros there, and every image would be the same
        extra={"multi_modal_projector.mm_input_projection_weight": (SIGLIP["hidden_size"], HIDDEN)},
    ),
    "gemma4": _images("Gemma4", GEMMA4, whole={**GEMMA4_TOKENS, "vision_config": GEMMA4_VISION}),
    "gemma4_moe": _images(
        "Gemma4",
        GEMMA4,
        {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2},
        whole={**GEMMA4_TOKENS, "vision_config": GEMMA4_VISION},
    ),
    "gemma4_ple": _images(
        "Gemma4",
        GEMMA4,
        {"hidden_size_per_layer_input": 128},
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": SLIDING["layer_types"] * 2},
        whole={**GEMMA4_TOKENS, "vision_config": GEMMA4_VISION},
        # of layers that share keys and values, unused
        extra={
            "model.language_model.layers.2.self_attn.k_proj.weight": (128, HIDDEN),
            "model.language_model.layers.2.self_attn.v_proj.weight": (128, HIDDEN),
            "model.language_model.layers.3.self_attn.k_proj.weight": (256, HIDDEN),
            "model.language_model.layers.3.self_attn.v_proj.weight": (256, HIDDEN),
            "model.language_model.layers.2.self_attn.k_norm.weight": (64,),
            "model.language_model.layers.3.self_attn.k_norm.weight": (128,),
        },
    ),
    "qwen2_5_vl": _images(
        "Qwen2_5_VL",
        {"rope_parameters": {**MROPE, "type": "mrope"}},
        whole={**IMAGES, "vision_config": {**QWEN_VISION, "window_size": 112, "fullatt_block_indexes": [1]}},
    ),
    "qwen3_vl": _images(
        "Qwen3VL",
        HEAD,
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}},
        whole={**IMAGES, "vision_config": {**QWEN3_VISION, "deepstack_visual_indexes": [0]}},
    ),
    "qwen3_vl_moe": _images(
        "Qwen3VLMoe",
        HEAD,
        ROUTED,
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}},
        # SGLang adds what it takes from three layers of the tower, however many the config names
        {"num_hidden_layers": 4},
        whole={**IMAGES, "vision_config": {**QWEN3_VISION, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]}},
        transposed=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "glm4v": _images(
        "Glm4v",
        {"rope_parameters": {**PARTIAL, "mrope_section": [4, 6, 6]}},
        whole={
            **IMAGES,
            "image_start_token_id": 1014,
            "image_end_token_id": 1015,
            "video_start_token_id": 1016,
            "video_end_token_id": 1017,
            "vision_config": {**QWEN_VISION, "image_size": 112},
        },
    ),
    "glm4v_moe": _images(
        "Glm4vMoe",
        HEAD,
        SHARED,
        {"rope_parameters": {**PARTIAL, "mrope_section": [4, 6, 6]}},
        whole={
            **IMAGES,
            "image_start_token_id": 1014,
            "image_end_token_id": 1015,
            "video_start_token_id": 1016,
            "video_end_token_id": 1017,
            "vision_config": {**QWEN_VISION, "image_size": 112},
        },
    ),
    # embeddings and rewards
    "qwen3_embedding": Family("Qwen3Model", "Qwen3Config", HEAD, written={"architectures": ["Qwen3ForCausalLM"]}),
    "e5_mistral": Family("MistralModel", "MistralConfig", {**HEAD, "sliding_window": None}),
    "qwen2_reward": _row(
        "Qwen2",
        written={"architectures": ["Qwen2ForRewardModel"]},
        extra={
            "score.0.weight": (HIDDEN, HIDDEN),
            "score.0.bias": (HIDDEN,),
            "score.2.weight": (1, HIDDEN),
            "score.2.bias": (1,),
        },
    ),
    "llama_reward": Family("LlamaForSequenceClassification", "LlamaConfig", {**HEAD, "num_labels": 1}),
}
