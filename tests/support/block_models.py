"""Random checkpoints of a few MB of families whose blocks we know; made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.tiny_models import TEXT

_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GLM_MOE = _MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 512}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"pad_token_id": 0}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"residual_multiplier": 0.5, "logits_scaling": 4.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"use_qk_norm": True, "pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {"head_dim": 32, "pad_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE | {"head_dim": 32, "num_experts": 4}),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", _GLM_MOE | {"head_dim": 32, "use_qk_norm": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
}


def make(folder: Path, family: str) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    model_class, config_class, more = FAMILIES[family]
    config = getattr(transformers, config_class)(**TEXT | more)
    model = getattr(transformers, model_class)(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones or zeros as they come
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif family == "gemma3" and "embed" in name:  # scaled up, and the head too: else each token predicts itself
            parameter.data *= 0.1
    out = folder / family
    model.save_pretrained(out)
    return out
