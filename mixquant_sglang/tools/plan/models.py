"""The models that ``mixquant plan`` knows, by name or by a config.json.

Refused, each with its reason: unknown names, and configs of MoE, MLA, hybrid, multi-modal or quantised models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import did_you_mean, nearest, show


@dataclass(frozen=True)
class Model:
    """A dense decoder's shape, as in its config.json."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool


# Each from the model's config.json on the Hugging Face Hub.
MODELS: tuple[Model, ...] = (
    Model("Qwen3-0.6B", 1024, 3072, 28, 16, 8, 128, 151936, True),
    Model("Qwen3-1.7B", 2048, 6144, 28, 16, 8, 128, 151936, True),
    Model("Qwen3-4B", 2560, 9728, 36, 32, 8, 128, 151936, True),
    Model("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936, False),
    Model("Qwen3-14B", 5120, 17408, 40, 40, 8, 128, 151936, False),
    Model("Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936, False),
    Model("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, False),
    Model("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256, False),
    Model("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, True),
    Model("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128, 128256, True),
)


def find_model(name: str) -> Model:
    """A known name, with or without its owner, or a directory with a config.json. MixQuantError lists what is known."""
    path = Path(name)
    try:
        is_dir = path.is_dir()
    except OSError:  # a name that no file system takes
        is_dir = False
    if is_dir or path.name == "config.json":
        return _read_config(path if path.name == "config.json" else path / "config.json")
    known = {model.name.lower(): model for model in MODELS}
    word = name.rpartition("/")[2].lower()
    for suffix in ("", "-instruct", "-base"):
        if word.endswith(suffix) and word.removesuffix(suffix) in known:
            return known[word.removesuffix(suffix)]
    names = [model.name for model in MODELS]
    raise MixQuantError(
        f"MODEL: {show(name)} is neither a directory with a config.json nor a known model; known: {', '.join(names)}"
        f"{did_you_mean(nearest(word, names))}"
    )


_SIZES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "moe_num_experts")


def _read_config(path: Path) -> Model:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(model.name for model in MODELS)
        raise MixQuantError(f"MODEL: {path}: no such file; allowed: a directory that holds one, or {names}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MixQuantError(f"MODEL: {path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise MixQuantError(f"MODEL: {path}: must be a JSON object")
    kind = str(config.get("model_type", ""))
    experts = [key for key in _EXPERTS if config.get(key)]
    if experts or "moe" in kind.lower():
        why = experts[0] if experts else f"model_type {show(kind)}"
        raise MixQuantError(f"MODEL: {path}: {why}: is a mixture of experts; `plan` knows dense models only")
    layer_types = config.get("layer_types")
    attention = {str(layer) for layer in layer_types} if isinstance(layer_types, list) else set()
    attention.discard("full_attention")
    for key, what in (
        ("kv_lora_rank", "latent attention"),
        ("text_config", "a multi-modal model"),
        ("quantization_config", "a quantised checkpoint"),
    ):
        if config.get(key):
            raise MixQuantError(f"MODEL: {path}: {key}: is {what}; `plan` knows dense BF16 language models only")
    if attention:
        raise MixQuantError(f"MODEL: {path}: layer_types: {', '.join(sorted(attention))}; allowed: full_attention")
    sizes = {name: _size(path, config, key) for name, key in _SIZES.items()}
    heads, hidden = sizes["heads"], sizes["hidden"]
    kv_heads = _size(path, config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise MixQuantError(f"MODEL: {path}: num_key_value_heads: {kv_heads} does not divide {heads} attention heads")
    return Model(
        name=path.resolve().parent.name,
        kv_heads=kv_heads,
        head_dim=_size(path, config, "head_dim", hidden // heads),
        tied=bool(config.get("tie_word_embeddings", False)),
        **sizes,
    )


def _size(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise MixQuantError(f"MODEL: {path}: {key}: is missing; `plan` needs the shape of a Llama-like decoder")
    most = 1000 if key == "num_hidden_layers" else 2**24
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise MixQuantError(f"MODEL: {path}: {key}: must be an integer from 1 to {most}, is {show(str(value))}")
    return value
