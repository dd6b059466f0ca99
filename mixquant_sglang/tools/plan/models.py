"""The models that ``mixquant plan`` knows, by name or by a config.json.

Refused: unknown names, files that are no config, and what ``weights/decoder_config.py`` refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import did_you_mean, nearest, show
from mixquant_sglang.recipe.modules import is_experts
from mixquant_sglang.weights.decoder import Block, Decoder
from mixquant_sglang.weights.decoder_config import read_decoder
from mixquant_sglang.weights.mixers import Attention
from mixquant_sglang.weights.quantised_config import FIELDS, Family, family, said


def _dense(
    name: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    tied: bool,
) -> Decoder:
    block = Block(Attention(heads, kv_heads, head_dim), intermediate)
    return Decoder(name, hidden, vocab, tied, (block,) * layers)


# What counts of each config.json on the Hugging Face Hub, under its keys.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    },
    "Qwen3-Next-80B-A3B": {
        **{"model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120},
        **{"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512},
        **{"shared_expert_intermediate_size": 512, "full_attention_interval": 4},
    },
    "Qwen3.5-9B": {
        "tie_word_embeddings": False,
        "text_config": {
            **{"model_type": "qwen3_5_text", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 248320},
            **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 12288},
            "full_attention_interval": 4,
        },
        "vision_config": {"model_type": "qwen3_5", **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}}
        | {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 2304},
    },
    "Qwen3.5-35B-A3B": {
        "tie_word_embeddings": False,
        "text_config": {
            **{"model_type": "qwen3_5_moe_text", "hidden_size": 2048, "num_hidden_layers": 40, "vocab_size": 248320},
            **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "full_attention_interval": 4},
            **{"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512},
            "shared_expert_intermediate_size": 512,
        },
        "vision_config": {"model_type": "qwen3_5_moe", **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}}
        | {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 2304},
    },
    "Gemma-4-26B-A4B": {
        "text_config": {
            **{"model_type": "gemma4_text", "hidden_size": 2816, "num_hidden_layers": 30, "vocab_size": 262144},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "intermediate_size": 2112},
            **{"num_global_key_value_heads": 2, "global_head_dim": 512, "attention_k_eq_v": True},
            **{"sliding_window": 1024, "hidden_size_per_layer_input": 0, "enable_moe_block": True},
            **{"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        },
        "vision_config": {"model_type": "gemma4_vision", "num_hidden_layers": 27, "hidden_size": 1152}
        | {"intermediate_size": 4304, "patch_size": 16, "position_embedding_size": 10240},
    },
    "GLM-4.5-Air": {
        **{"model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46, "vocab_size": 151552},
        **{"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 10944},
        **{"n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1},
    },
    "GLM-4.7-Flash": {
        **{"model_type": "glm4_moe_lite", "hidden_size": 2048, "num_hidden_layers": 47, "vocab_size": 154880},
        **{"num_attention_heads": 20, "intermediate_size": 10240, "q_lora_rank": 768, "kv_lora_rank": 512},
        **{"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256},
        **{"n_routed_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 1536},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1},
    },
}

# The dense ones: each from the model's config.json on the Hugging Face Hub.
MODELS: tuple[Decoder, ...] = (
    _dense("Qwen3-0.6B", 1024, 3072, 28, 16, 8, 128, 151936, True),
    _dense("Qwen3-1.7B", 2048, 6144, 28, 16, 8, 128, 151936, True),
    _dense("Qwen3-4B", 2560, 9728, 36, 32, 8, 128, 151936, True),
    _dense("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936, False),
    _dense("Qwen3-14B", 5120, 17408, 40, 40, 8, 128, 151936, False),
    _dense("Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936, False),
    _dense("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, False),
    _dense("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256, False),
    _dense("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, True),
    _dense("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128, 128256, True),
    *(read_decoder(config, name, name) for name, config in _CONFIGS.items()),
)
_SUFFIXES = ("", "-instruct", "-base", "-it", "-instruct-2507", "-thinking-2507", "-thinking")


def find_model(name: str) -> Decoder:
    """A known name, with or without its owner, or a directory with a config.json. MixQuantError lists what is known."""
    file = _file(name)
    if file is not None:
        return _read_config(file)[0]
    known = {model.name.lower(): model for model in MODELS}
    word = name.rpartition("/")[2].lower()
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and word.removesuffix(suffix) in known:
            return known[word.removesuffix(suffix)]
    names = [model.name for model in MODELS]
    raise MixQuantError(
        f"MODEL: {show(name)} is neither a directory with a config.json nor a known model; known: {', '.join(names)}"
        f"{did_you_mean(nearest(word, names))}"
    )


def _file(name: str) -> Path | None:
    """The config.json that ``name`` is, or is the directory of."""
    path = Path(name)
    try:
        is_dir = path.is_dir()
    except OSError:  # a name that no file system takes
        is_dir = False
    if path.name == "config.json":
        return path
    return path / "config.json" if is_dir else None


def find_decoder(folder: Path) -> Decoder:
    """Of the config.json in ``folder``, quantised or not. MixQuantError for one that is not known."""
    return _read_config(folder / "config.json")[0]


def find_quantised(name: str) -> tuple[Family, Callable[[str, Sequence[str]], bool]] | None:
    """What the checkpoint in the directory ``name`` is quantised in, and whether a linear, or experts, are BF16 in it:
    its files say so, or, where there are none, its config's lists.  None for one that is not quantised, and for known
    names.  MixQuantError for what no recipe takes."""
    file = _file(name)
    found = _read_config(file)[1] if file is not None else None
    if file is None or found is None:
        return None
    known, folder = family(f"MODEL: {file}: {found[0]}", found[1]), file.resolve().parent
    if not any(folder.glob("*.safetensors")):
        return known, known.leaves
    from mixquant_sglang.weights.quantised import QuantisedCheckpoint

    checkpoint = QuantisedCheckpoint.open(folder)

    def in_bf16(name: str, shards: Sequence[str]) -> bool:
        if is_experts(name):
            checkpoint.check_experts(name)
        return not checkpoint.of_linear(name, shards)

    return known, in_bf16


def _read_config(path: Path) -> tuple[Decoder, tuple[str, dict[str, Any]] | None]:
    """The decoder, and where what is said of quantisation."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(model.name for model in MODELS)
        raise MixQuantError(f"MODEL: {path}: no such file; allowed: a directory that holds one, or {names}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MixQuantError(f"MODEL: {path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise MixQuantError(f"MODEL: {path}: must be a JSON object")
    bare = {key: value for key, value in config.items() if key not in FIELDS}
    if isinstance(inner := bare.get("text_config"), dict):
        bare["text_config"] = {key: value for key, value in inner.items() if key not in FIELDS}
    where, folder = f"MODEL: {path}", path.resolve().parent
    return read_decoder(bare, folder.name, where), said(config, folder, where)
