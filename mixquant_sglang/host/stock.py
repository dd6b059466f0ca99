"""Models whose BF16 code SGLang changes as soon as a quantization is named, so that BF16 decode would not be stock's.

Mixtral is mended by a hook (``host/hooks/architecture.py``); the others are refused, each with what differs.  Every
place in SGLang that asks, the harmless ones too: ``docs/models.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.select import Device

# Where the model's own code asks ``quant_config is None``.
_OTHER_CODE = {
    "KimiLinearForCausalLM": "fuses the projections of linear attention into one GEMM (do_fuse_qkvbfg)",
    "KimiK3ForConditionalGeneration": "fuses the projections of linear attention into one GEMM (do_fuse_qkvbfg)",
    "KimiK3LinearForCausalLM": "fuses the projections of linear attention into one GEMM (do_fuse_qkvbfg)",
    "Glm5NextForConditionalGeneration": "fuses the projections of linear attention into one GEMM (_can_fuse_proj)",
    "BeamForCausalLM": "packs attention's projections, and has a router and an all-reduce of experts of its own",
    "MuseGlimmerForCausalLM": "has one GEMM for q, k and v (unfused_qkv)",
    "MuseGlimmerForConditionalGeneration": "has one GEMM for q, k and v (unfused_qkv)",
    "MuseSparkForConditionalGeneration": "loads the model at all",
    "XllmForCausalLM": "loads the model at all",
    "K2HorizonForCausalLM": "loads the model at all",
    "DiffusionGemmaForBlockDiffusion": "loads the model at all",
}

# Where argument overrides of the architecture ask ``quantization is None`` for the MoE back end (``auto``).
_TRTLLM_ON_SM100 = frozenset(
    {
        *("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "KimiK25ForConditionalGeneration"),
        *("MistralLarge3ForCausalLM", "PixtralForConditionalGeneration", "GlmMoeDsaForCausalLM"),
        *("HYV4ForCausalLM", "Dots3NoteForCausalLM"),
        *("Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration", "Qwen3NextForCausalLM"),
        *("Qwen3_5MoeForConditionalGeneration", "InternS2PreviewForConditionalGeneration"),
        *("Qwen3_5ForConditionalGeneration", "Qwen4ExpForConditionalGeneration", "Glm4MoeForCausalLM"),
        *("NemotronHForCausalLM", "NemotronHPuzzleForCausalLM", "NemotronH_Omni_Reasoning_V3"),
        *("Cohere2VisionForConditionalGeneration", "Cohere2MoeForCausalLM"),
    }
)
_TRITON_KERNEL = frozenset({"GptOssForCausalLM"})

# Where the format of top-k follows ``quant_config is None``: the same with the back end Triton, which ``auto`` is.
_TOPK_FORMAT = frozenset(
    {
        *("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
        *("KimiK25ForConditionalGeneration", "MistralLarge3ForCausalLM", "Glm4MoeLiteForCausalLM"),
        *("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"),
    }
)

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_model(model_config: Any, device: Callable[[], Device], moe_backend: str | None) -> None:
    """Raises ``MixQuantError`` for a model that mixquant cannot serve as stock SGLang decodes it.

    ``model_config``: SGLang's ModelConfig.  ``moe_backend``: what ``--moe-runner-backend`` asked for; None in a process
    that did not parse the flags.
    """
    name = (getattr(model_config.hf_config, "architectures", None) or ["a model without a name"])[0]
    path = model_config.model_path
    if getattr(model_config, "is_encoder_decoder", False):
        raise MixQuantError(
            f"{path} is {name}, whose encoder rows are not rows of the prompt: serve it without mixquant"
        )
    if name in _OTHER_CODE:
        raise MixQuantError(
            f"{path} is {name}: SGLang {_OTHER_CODE[name]} only where no quantization is named, so decode would not be "
            "that of stock SGLang; serve it without mixquant"
        )
    if moe_backend is None or not any(getattr(model_config.hf_text_config, field, None) for field in _EXPERTS):
        return
    picked = None
    if moe_backend == "auto" and name in _TRTLLM_ON_SM100 | _TRITON_KERNEL:
        capability = device().capability
        if capability is not None and name in _TRITON_KERNEL:
            picked = "triton_kernel"
        elif capability is not None and capability[0] == 10:
            picked = "flashinfer_trtllm"
    if picked:
        raise MixQuantError(
            f"{path} is {name}: SGLang picks the MoE back end {picked} for its BF16 experts here only where no "
            "quantization is named, so decode would not be that of stock SGLang; pass --moe-runner-backend triton, and "
            "decode is that of SGLang with the same flag"
        )
    if name in _TOPK_FORMAT and moe_backend not in ("auto", "triton"):
        raise MixQuantError(
            f"{path} is {name}: with --moe-runner-backend {moe_backend} SGLang hands its experts another form of top-k "
            "where a quantization is named, so decode would not be that of stock SGLang; allowed: auto, triton"
        )
