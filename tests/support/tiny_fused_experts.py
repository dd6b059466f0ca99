"""Random checkpoints of families that hold all experts of a layer in one tensor; made by transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tests.support.tiny_models import TEXT

_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}


def make(folder: Path, family: str) -> Path:
    """``family``: qwen3_5_moe, gemma4, llama4 or qwen3_vl_moe."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, config = {"qwen3_5_moe": _qwen3_5, "gemma4": _gemma4, "llama4": _llama4, "qwen3_vl_moe": _qwen3_vl}[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Llama-4's rotary table is complex
        model = getattr(transformers, name)(config).to(torch.bfloat16)
    out = folder / family
    model.save_pretrained(out)
    return out


def _qwen3_5() -> tuple[str, Any]:
    import transformers

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    more = {
        "shared_expert_intermediate_size": 64,
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    }
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32}
    text = {**TEXT, **experts, **more, **linear, "linear_value_head_dim": 32, "full_attention_interval": 2}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=_VISION, tie_word_embeddings=False)
    return "Qwen3_5MoeForConditionalGeneration", config


def _qwen3_vl() -> tuple[str, Any]:
    import transformers

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    text = {**TEXT, **experts, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]}}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=_VISION, tie_word_embeddings=False)
    return "Qwen3VLMoeForConditionalGeneration", config


def _gemma4() -> tuple[str, Any]:
    import transformers

    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    more = {"head_dim": 32, "global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"]}
    text = {**TEXT, **experts, **more, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 32, "position_embedding_size": 64}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    return "Gemma4ForConditionalGeneration", config


def _llama4() -> tuple[str, Any]:
    import transformers

    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 64, "intermediate_size_mlp": 128}
    text = {**TEXT, **experts, "head_dim": 32, "interleave_moe_layer_step": 1, "attn_temperature_tuning": False}
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
    more = {"image_size": 28, "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64}
    config = transformers.Llama4Config(
        text_config=text, vision_config={**vision, **more, "projector_output_dim": 64}, tie_word_embeddings=False
    )
    return "Llama4ForConditionalGeneration", config
