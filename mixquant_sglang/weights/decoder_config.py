"""Reads a ``Decoder`` from a config.json of any family whose blocks ``decoder.py`` knows.  No torch, no SGLang.

Keys and their defaults are those of transformers' configuration classes and of SGLang's models.  Refused, each with its
key: blocks that are not known (Mamba, lightning attention, KDA, sparse attention's indexer), encoder-decoders,
quantised checkpoints, and sizes that are missing or out of range.  A tower whose config leaves out its sizes is not
counted, and named in ``Decoder.unread``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import show
from mixquant_sglang.weights.decoder import Block, Decoder, Experts
from mixquant_sglang.weights.mixers import Attention, DeltaRule, Latent, Mixer

Config = Mapping[str, Any]

_INNER = ("text_config", "llm_config", "language_config")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_TOP_K = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_k")

# What transformers assumes where a config.json leaves a key out, as far as it is not none or false.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window_pattern": 4, "sliding_window": 4096},
    "deepseek_v3": {"first_k_dense_replace": 3},
    "exaone4": {"sliding_window_pattern": 4, "sliding_window": 4096},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window_pattern": 2, "sliding_window": 4096},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window_pattern": 6, "sliding_window": 4096},
    "gemma4_text": {
        **{"tie_word_embeddings": True, "sliding_window_pattern": 6, "sliding_window": 512, "head_dim": 256},
        **{"global_head_dim": 512, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
    },
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "gpt_oss": {"sliding_window_pattern": 2, "sliding_window": 128, "head_dim": 64},
    "llama4_text": {"interleave_moe_layer_step": 1, "attention_chunk_size": 8192, "no_rope_layer_interval": 4},
    "olmo3": {"sliding_window_pattern": 4, "sliding_window": 4096},
    "qwen2_moe": {"shared_expert_intermediate_size": 5632},
    "qwen3_5_moe_text": {"head_dim": 256, "shared_expert_intermediate_size": 512},
    "qwen3_5_text": {"head_dim": 256},
    "qwen3_next": {"head_dim": 256, "shared_expert_intermediate_size": 512},
}
_DELTA = {  # those of Qwen3-Next and Qwen3.5
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "full_attention_interval": 4},
}
_ALIASES = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "llama4": "llama4_text"}

# Of the families where blocks, or SGLang's names, are not those of most.
_EXPERTS_AT = {"mixtral": "block_sparse_moe", "phimoe": "block_sparse_moe", "gemma4_text": "moe"}
_SHARED_AT = "mlp.shared_expert"  # Qwen's; DeepSeek's and GLM's are shared_experts
_NO_GATE = {"phi": ("fc1", "fc2"), "starcoder2": ("c_fc", "c_proj")}
_OUT = {"phi": "dense"}
_ATTENTION_NOT_OFFERED = frozenset({"gpt_oss", "stablelm"})
_SANDWICHED = frozenset({"gemma2", "gemma3_text", "gemma4_text", "glm4", "olmo2", "olmo3"})
# Those whose windowed layers SGLang gives a pool of their own (configs/model_config.py, is_hybrid_swa_model), and how
# many tokens it has for each of full attention's (--swa-full-tokens-ratio).
_WINDOW_POOLS = frozenset({"gemma4_text", "gpt_oss", "llama4_text"})
_WINDOW_SHARE = 0.8

# Blocks that nobody has described here.
_UNKNOWN = {
    "index_topk": "sparse attention with an indexer",
    "linear_attn_config": "Kimi's delta attention",
    "hybrid_override_pattern": "Mamba blocks",
    "layers_block_type": "Mamba blocks",
    "mamba_d_state": "Mamba blocks",
    "attn_type_list": "lightning attention",
    "hybrid_layer_pattern": "windows whose heads differ",
    "moe_layer_start_index": "experts in some layers by another rule",
}


@dataclass(frozen=True)
class _Reader:
    """``config``: of the language model; ``where``: in front of each error."""

    config: Config
    where: str
    kind: str

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        if value is None:
            value = _DEFAULTS.get(self.kind, {}).get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise MixQuantError(f"{self.where}: {key}: is missing; `plan` needs the shape of a Llama-like decoder")
        most = 1000 if key == "num_hidden_layers" else 2**24
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise MixQuantError(f"{self.where}: {key}: must be an integer from 1 to {most}, is {show(str(value))}")
        return value

    def number(self, key: str) -> int:
        """0 or more; 0 where the key is missing."""
        return self.size(key) if self.get(key) else 0

    def listed(self, key: str) -> list[Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise MixQuantError(f"{self.where}: {key}: must be a list, is {show(str(value))}")
        return value

    def any_size(self, keys: Sequence[str]) -> int:
        return self.size(next((key for key in keys if self.config.get(key) is not None), keys[0]))

    def refuse(self, key: str, what: str) -> MixQuantError:
        return MixQuantError(f"{self.where}: {key}: is {what}; `plan` and the server's footprint do not know its sizes")


def read_decoder(config: Config, name: str, where: str = "config.json") -> Decoder:
    """The decoder of a parsed config.json. MixQuantError, which begins with ``where``, for one that is refused."""
    if config.get("quantization_config"):
        raise MixQuantError(
            f"{where}: quantization_config: is a quantised checkpoint; `plan` knows BF16 language models only"
        )
    inner = next((config[key] for key in _INNER if isinstance(config.get(key), Mapping)), config)
    kind = str(inner.get("model_type") or config.get("model_type") or "")
    read = _Reader(inner, where, _ALIASES.get(kind, kind))
    for one in (config, inner):
        if one.get("is_encoder_decoder"):
            raise read.refuse("is_encoder_decoder", "an encoder-decoder")
        if one.get("quantization_config"):
            raise read.refuse("quantization_config", "a quantised checkpoint")
    for key, what in _UNKNOWN.items():
        if inner.get(key):
            raise read.refuse(key, what)
    layers = read.size("num_hidden_layers")
    hidden = read.size("hidden_size")
    mixers, blocks = _mixers(read, layers, hidden), []
    for i in range(layers):
        blocks.append(_block(read, mixers[i], i, hidden))
    tied = config.get("tie_word_embeddings", read.get("tie_word_embeddings", False))
    per_layer = _per_layer_inputs(read)
    tower, unread = _towers(config, where, hidden)
    return Decoder(
        name=name,
        hidden=hidden,
        vocab=read.size("vocab_size"),
        tied=bool(tied),
        blocks=tuple(blocks),
        tables=layers * per_layer * read.size("vocab_size_per_layer_input", 1) if per_layer else 0,
        tower=tower,
        window_share=_WINDOW_SHARE if read.kind in _WINDOW_POOLS else 1.0,
        unread=unread,
    )


def _per_layer_inputs(read: _Reader) -> int:
    """Numbers that Gemma's small models add in each block for each token."""
    return read.size("hidden_size_per_layer_input") if read.get("hidden_size_per_layer_input") else 0


def _mixers(read: _Reader, layers: int, hidden: int) -> list[Mixer]:
    heads = read.size("num_attention_heads")
    if read.get("kv_lora_rank"):
        rank = read.get("q_lora_rank")
        latent = Latent(
            heads=heads,
            q_rank=read.size("q_lora_rank") if rank else None,
            kv_rank=read.size("kv_lora_rank"),
            nope=read.size("qk_nope_head_dim"),
            rope=read.size("qk_rope_head_dim"),
            value=read.size("v_head_dim"),
        )
        return [latent] * layers
    kv_heads = read.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise MixQuantError(f"{read.where}: num_key_value_heads: {kv_heads} does not divide {heads} attention heads")
    head_dim = read.size("head_dim", hidden // heads)
    types = _layer_types(read, layers)
    gated = "linear_attention" in types and bool(read.get("attn_output_gate", True))
    offered, out = read.kind not in _ATTENTION_NOT_OFFERED, _OUT.get(read.kind, "o_proj")
    basic = Attention(heads, kv_heads, head_dim, None, gated, offered, out)
    made: dict[str, Mixer] = {"full_attention": basic}
    if read.kind == "gemma4_text":  # its windowless layers have heads of their own; SGLang holds k = v twice
        shared = read.get("attention_k_eq_v") and read.get("num_global_key_value_heads")
        wide_kv = read.size("num_global_key_value_heads") if shared else kv_heads
        made["full_attention"] = Attention(heads, wide_kv, read.size("global_head_dim"))
    if "sliding_attention" in types:
        made["sliding_attention"] = replace(basic, window=read.size("sliding_window"))
    if "chunked_attention" in types:  # on average a query sees half of its chunk
        made["chunked_attention"] = replace(basic, window=read.size("attention_chunk_size") // 2)
    if "linear_attention" in types:
        made["linear_attention"] = _delta_rule(read)
    return [made[kind] for kind in types]


def _delta_rule(read: _Reader) -> DeltaRule:
    if not read.kind.startswith(("qwen3_next", "qwen3_5")) and not read.get("linear_num_value_heads"):
        raise read.refuse("layer_types", "linear_attention without linear_num_value_heads")
    sizes = {key: read.size(key, default) for key, default in _DELTA.items()}
    return DeltaRule(
        key_heads=sizes["linear_num_key_heads"],
        value_heads=sizes["linear_num_value_heads"],
        key_dim=sizes["linear_key_head_dim"],
        value_dim=sizes["linear_value_head_dim"],
        kernel=sizes["linear_conv_kernel_dim"],
        number=4 if read.get("mamba_ssm_dtype", "float32") == "float32" else 2,
    )


def _layer_types(read: _Reader, layers: int) -> list[str]:
    """A type for each block, from ``layer_types`` or the pattern that stands for it."""
    known = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
    types = read.listed("layer_types")
    if types is not None:
        strange = {str(one) for one in types} - {*known}
        if strange:
            raise MixQuantError(f"{read.where}: layer_types: {', '.join(sorted(strange))}; allowed: {', '.join(known)}")
        if len(types) < layers:
            raise MixQuantError(f"{read.where}: layer_types: {len(types)} entries for {layers} layers")
        return types[:layers]
    every, other = 1, "full_attention"
    if read.get("full_attention_interval") or read.kind.startswith(("qwen3_next", "qwen3_5")):
        every, other = read.size("full_attention_interval", _DELTA["full_attention_interval"]), "linear_attention"
    elif read.kind == "llama4_text" and read.get("attention_chunk_size"):
        every, other = read.size("no_rope_layer_interval"), "chunked_attention"
    elif "sliding_window_pattern" in _DEFAULTS.get(read.kind, {}) and read.get("sliding_window"):
        every, other = read.size("sliding_window_pattern"), "sliding_attention"
    made = ["full_attention" if (i + 1) % every == 0 else other for i in range(layers)]
    if read.kind == "gemma4_text":
        made[-1] = "full_attention"
    return made


def _block(read: _Reader, mixer: Mixer, i: int, hidden: int) -> Block:
    experts = _experts(read) if _has_experts(read, i) else None
    parallel = read.kind == "gemma4_text"  # experts beside the MLP
    dense = 0
    if experts is None or parallel:
        dense = read.any_size(("intermediate_size_mlp", "intermediate_size"))
        first_shared = read.size("num_hidden_layers") - read.number("num_kv_shared_layers")
        if read.get("use_double_wide_mlp") and i >= first_shared:
            dense *= 2
    norms = (2 if read.kind in _SANDWICHED else 0) + (3 if parallel and experts else 0)
    return Block(
        mixer,
        dense,
        experts,
        kept=3 * hidden * _per_layer_inputs(read),
        norms=norms,
        mlp="feed_forward" if read.kind == "llama4_text" else "mlp",
        halves=_NO_GATE.get(read.kind),
    )


def _has_experts(read: _Reader, i: int) -> bool:
    if not any(read.get(key) for key in _COUNTS) or read.get("enable_moe_block", True) is False:
        return False
    types = read.listed("mlp_layer_types")
    if types is not None and i < len(types):
        return bool(types[i] == "sparse")
    if read.kind == "llama4_text":
        listed = read.listed("moe_layers")
        return (i + 1) % read.size("interleave_moe_layer_step") == 0 if listed is None else i in listed
    if i in (read.listed("mlp_only_layers") or ()) or i < read.number("first_k_dense_replace"):
        return False
    if isinstance(read.get("moe_layer_freq"), list):
        frequency = read.get("moe_layer_freq")
        return i < len(frequency) and bool(frequency[i])
    return (i + 1) % read.size("decoder_sparse_step", 1) == 0 and i % read.size("moe_layer_freq", 1) == 0


def _experts(read: _Reader) -> Experts:
    """Its width is ``moe_intermediate_size``, or ``intermediate_size`` in families whose blocks are all experts."""
    inner = read.any_size(("moe_intermediate_size", "intermediate_size"))
    at = _EXPERTS_AT.get(read.kind, "feed_forward" if read.kind == "llama4_text" else "mlp")
    shared, shared_at = 0, f"{at}.shared_experts"
    if read.kind == "llama4_text":
        shared, shared_at = inner, f"{at}.shared_expert"
    elif read.get("shared_expert_intermediate_size"):
        shared, shared_at = read.size("shared_expert_intermediate_size"), _SHARED_AT
    elif counted := next((key for key in _SHARED if read.get(key)), None):
        shared = read.size(counted) * read.size("moe_shared_expert_intermediate_size", inner)
    count, top_k = read.any_size(_COUNTS), read.any_size(_TOP_K)
    if top_k > count:
        raise MixQuantError(f"{read.where}: {top_k} experts per token are more than the {count} that there are")
    return Experts(f"{at}.experts", count, top_k, inner, shared, shared_at)


# Towers whose MLP has a gate, so three matrices.
_GATED_TOWERS = ("qwen2_5_vl", "gemma4", "glm4v", "glm4v_moe", "pixtral")


def _towers(config: Config, where: str, hidden: int) -> tuple[int, tuple[str, ...]]:
    """(parameters, what is not counted), from a vision_config; within some percent of a tower."""
    unread = [key for key in ("audio_config", "talker_config", "speech_config") if config.get(key)]
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return 0, tuple(unread)

    def first(*keys: str) -> int:
        found = (vision[key] for key in keys if isinstance(vision.get(key), int))
        return int(next(found, 0))

    width = first("embed_dim", "hidden_size", "width")
    depth = first("depth", "num_hidden_layers", "layers")
    ratio = vision.get("mlp_ratio")
    inner = first("intermediate_size") or int(width * ratio if isinstance(ratio, int | float) else 0)
    if not (width and depth and inner):
        return 0, ("vision_config", *unread)
    kind = str(vision.get("model_type", ""))
    if kind.startswith("glm4v"):  # its intermediate_size is the merger's
        inner = first("out_hidden_size") or inner
    patch = first("patch_size", "spatial_patch_size") or 14
    merged = width * (first("spatial_merge_size") or 1) ** 2
    embedding = 3 * patch**2 * (first("temporal_patch_size") or 1) * width
    out = first("out_hidden_size") or hidden
    deep = vision.get("deepstack_visual_indexes")
    mergers = 1 + (len(deep) if isinstance(deep, list) else 0)
    projector = mergers * merged * (merged + out) if first("spatial_merge_size") else width * out
    positions = first("num_position_embeddings") * width + 2 * first("position_embedding_size") * width
    blocks = depth * (4 * width**2 + (3 if kind.startswith(_GATED_TOWERS) else 2) * width * inner)
    return blocks + embedding + projector + positions, tuple(unread)
