"""Checkpoint files of the tiny model, with torch alone: safetensors by hand, fused weights and a checkpoint's names."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts.models.tiny_model import Shape, Weights, weight_shapes

SHARD_BYTES = 15_000_000
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def split_weights(shape: Shape, weights: Weights) -> Weights:
    """Fused to the checkpoint's names."""
    out: Weights = {}
    for name, weight in weights.items():
        if "qkv_proj" in name:
            parts = torch.split(weight, [shape.q_size, shape.kv_size, shape.kv_size])
            out |= {name.replace("qkv", kind): part for kind, part in zip("qkv", parts, strict=True)}
        elif "gate_up_proj" in name:
            gate, up = weight.chunk(2)
            out |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            out[name] = weight
    return out


def fuse_weights(shape: Shape, tensors: Weights) -> Weights:
    """The checkpoint's names to fused ones."""
    out = {}
    for name in weight_shapes(shape):
        kinds = ("q", "k", "v") if "qkv_proj" in name else ("gate", "up") if "gate_up_proj" in name else ()
        fused = "qkv" if len(kinds) == 3 else "gate_up"
        out[name] = torch.cat([tensors[name.replace(fused, kind)] for kind in kinds]) if kinds else tensors[name]
    return out


def write_safetensors(path: Path, tensors: Weights) -> None:
    """The format by hand: 8 bytes of header length, JSON, the bytes. BF16 on the CPU only."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def read_safetensors(path: Path) -> Weights:
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        low, high = (start + offset for offset in entry["data_offsets"])
        data = torch.frombuffer(bytearray(raw[low:high]), dtype=_DTYPES[entry["dtype"]])
        tensors[name] = data.view(entry["shape"])
    return tensors


def config_json(shape: Shape, pad: int, stop: int) -> dict[str, Any]:
    """What transformers and SGLang read; rope_theta in both of its places, for old and new readers."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **asdict(shape),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shape.num_hidden_layers,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": pad,
        "torch_dtype": "bfloat16",
    }


def write_checkpoint(out: Path, shape: Shape, weights: Weights, pad: int, stop: int) -> None:
    """config.json, generation_config.json, shards of at most SHARD_BYTES and their index."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", torch.bfloat16) for name, t in split_weights(shape, weights).items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[Weights] = [{}]
    each = total / -(-total // SHARD_BYTES) * 1.02
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > each:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(out / name, shard)
    where = {key: name for name, shard in zip(names, shards, strict=True) for key in sorted(shard)}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    generation = {"eos_token_id": [stop, pad], "pad_token_id": pad}
    files = {"config": config_json(shape, pad, stop), "generation_config": generation}
    for name, content in (files | {"model.safetensors.index": index}).items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def read_checkpoint(path: Path) -> tuple[Shape, Weights]:
    """The shape and fused BF16 weights of a checkpoint that write_checkpoint wrote."""
    config = json.loads((path / "config.json").read_text())
    shape = Shape(**{name: config[name] for name in asdict(Shape())})
    index = json.loads((path / "model.safetensors.index.json").read_text())
    tensors: Weights = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors |= read_safetensors(path / name)
    return shape, fuse_weights(shape, tensors)
