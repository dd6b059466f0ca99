"""Random checkpoints of a few MB of families that are not plain dense models; made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}


def make(folder: Path, family: str) -> Path:
    """``family``: mixtral, qwen3_moe, qwen2_5_vl or stablelm."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, config = {
        "mixtral": ("MixtralForCausalLM", _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2)),
        "qwen3_moe": (
            "Qwen3MoeForCausalLM",
            _config("Qwen3MoeConfig", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
        ),
        "stablelm": ("StableLmForCausalLM", _config("StableLmConfig", partial_rotary_factor=0.25)),
        "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", _vision_language()),
    }[family]
    model = getattr(transformers, name)(config).to(torch.bfloat16)
    out = folder / family
    model.save_pretrained(out)
    return out


def _config(name: str, **more: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**TEXT, **more)


def _vision_language() -> Any:
    import transformers

    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=_VISION,
        image_token_id=10,
        video_token_id=11,
        vision_start_token_id=12,
        vision_end_token_id=13,
        tie_word_embeddings=False,
    )
