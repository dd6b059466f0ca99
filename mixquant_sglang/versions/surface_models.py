"""The part of ``surface.py`` that is of SGLang's models, and what a row of it says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """``owner``: the class, or the module that sets these on an object from outside.  ``versions``: those that have
    them; empty: all.  A version that is none of ours is asked for what the newest has."""

    owner: str
    names: tuple[str, ...]
    used_in: str
    versions: tuple[str, ...] = ()


OLD, NEW = ("0.5.17",), ("0.5.23",)
_MODELS = "sglang.srt.models"
_LLAMA_LIKE = ("llama.Llama", "qwen2.Qwen2", "qwen3.Qwen3", "granite.Granite")
_SANDWICHED = ("glm4.Glm4",)
_WITH_EXPERTS = ("qwen3_moe.Qwen3Moe", "qwen2_moe.Qwen2Moe", "glm4_moe.Glm4Moe")

# Of the blocks that we know.
BLOCKS: tuple[Row, ...] = (
    *(
        Row(
            f"{_MODELS}.{name}DecoderLayer",
            ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
            "layers/fused.py",
        )
        for name in (*_LLAMA_LIKE, *_SANDWICHED, *_WITH_EXPERTS)
    ),
    Row(
        f"{_MODELS}.mixtral.MixtralDecoderLayer",
        ("self_attn", "block_sparse_moe", "input_layernorm", "post_attention_layernorm"),
        "layers/families.py",
    ),
    Row(f"{_MODELS}.olmo2.Olmo2DecoderLayer", ("self_attn", "mlp"), "layers/families.py"),
    *(
        Row(f"{_MODELS}.{name}MLP", ("gate_up_proj", "down_proj", "act_fn"), "layers/fused.py")
        for name in (
            *("llama.Llama", "qwen2.Qwen2", "granite.Granite", "commandr.Cohere", "olmo2.Olmo2", "glm4.Glm4"),
            *("qwen2_moe.Qwen2Moe", "glm4_moe.Glm4Moe"),
        )
    ),
    *(
        Row(f"{_MODELS}.{name}Attention", ("qkv_proj", "o_proj", "attn", "q_size"), "layers/fused.py")
        for name in (*_LLAMA_LIKE, *_SANDWICHED, *_WITH_EXPERTS, "mixtral.Mixtral", "olmo2.Olmo2", "commandr.Cohere")
    ),
    Row(f"{_MODELS}.qwen3_moe.Qwen3MoeAttention", ("use_fused_qk_norm_rope",), "layers/blocks.py"),
    *(
        Row(
            f"{_MODELS}.{name}Attention",
            ("num_heads", "num_kv_heads", "head_dim", "kv_size", "rotary_emb", "forward"),
            "layers/norm_rope.py, versions/qk.py",
        )
        for name in ("llama.Llama", "qwen2.Qwen2", "qwen3.Qwen3", "qwen3_moe.Qwen3Moe")
    ),
    *(
        Row(f"{_MODELS}.{name}Attention", ("q_norm", "k_norm", "alt_stream"), "layers/norm_rope.py, versions/qk.py")
        for name in ("qwen3.Qwen3", "qwen3_moe.Qwen3Moe")
    ),
    Row(
        f"{_MODELS}.qwen3_moe.Qwen3MoeAttention",
        ("apply_qk_norm_rope", "compatible_with_fused_kv_buffer", "_used_fused_qk_norm_rope_last_call"),
        "layers/norm_rope.py",
    ),
    Row("sglang.srt.layers.radix_attention.RadixAttention", ("k_scale", "v_scale"), "layers/norm_rope.py"),
    Row(
        "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding",
        (
            *("cos_sin_cache", "is_neox_style", "head_size", "rotary_dim", "use_fallback_kernel"),
            *("forward_cuda", "_forward_method"),
        ),
        "versions/qk.py, layers/norm_rope.py",
    ),
    Row(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool",
        ("dtype", "store_dtype", "kv_cache_layout"),
        "versions/qk.py",
    ),
    Row("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool", ("requires_physical_write_loc",), "versions/qk.py", NEW),
    Row("sglang.srt.model_executor.forward_batch_info.ForwardBatch", ("out_cache_loc",), "layers/norm_rope.py"),
    Row(
        "sglang.kernels.ops.attention.rope.FusedSetKVBufferArg", ("k_buffer", "v_buffer", "cache_loc"), "versions/qk.py"
    ),
    *(
        Row(
            f"{_MODELS}.{name}ForCausalLM",
            ("model", "capture_aux_hidden_states", "load_weights"),
            "layers/fused.py",
        )
        for name in ("llama.Llama", "qwen2.Qwen2", "qwen3.Qwen3")
    ),
    *(
        Row(f"{_MODELS}.{name}ForCausalLM", ("model", "load_weights"), "layers/last_layer.py")
        for name in ("granite.Granite", *_SANDWICHED, *_WITH_EXPERTS, "mixtral.Mixtral", "olmo2.Olmo2")
    ),
    *(
        Row(f"{_MODELS}.{name}Model", ("layers", "norm"), "layers/fused.py")
        for name in (*_LLAMA_LIKE, *_SANDWICHED, *_WITH_EXPERTS, "mixtral.Mixtral", "olmo2.Olmo2")
    ),
    Row(
        f"{_MODELS}.qwen3_5.Qwen3_5GatedDeltaNet",
        ("_forward_input_proj", "in_proj_qkvz", "in_proj_ba"),
        "layers/bypasses.py",
    ),
    Row(f"{_MODELS}.qwen3_5.Qwen3_5GatedDeltaNet", ("_fused_in_proj_weight",), "layers/bypasses.py", NEW),
)
