"""Tiny BF16 checkpoints, and the same weights in NVFP4 as compressed-tensors and ModelOpt write them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixquant_sglang.formats import nvfp4
from mixquant_sglang.tools.quantize.configs import quantization_config
from mixquant_sglang.tools.quantize.scales import encode_scale
from mixquant_sglang.tools.quantize.targets import Targets
from mixquant_sglang.weights.checkpoint import INDEX

HIDDEN, INNER, LAYERS = 64, 96, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (32, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LINEARS = [f"model.layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in SHAPES]
CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "torch_dtype": "bfloat16",
}
Tensors = dict[str, torch.Tensor]


def bf16_tensors() -> Tensors:
    """Linears of very different magnitudes, so that parts of a fused layer have different tensor scales."""
    random = torch.Generator().manual_seed(4)
    made = {
        name: torch.randn(128, HIDDEN, generator=random).bfloat16()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for i, name in enumerate(LINEARS):
        n, k = SHAPES[name.split(".", 3)[3]]
        made[f"{name}.weight"] = (torch.randn(n, k, generator=random) * 0.02 * 3 ** (i % 5)).bfloat16()
    for layer in range(LAYERS):
        made[f"model.layers.{layer}.input_layernorm.weight"] = torch.rand(HIDDEN, generator=random).bfloat16()
    return made


def save(folder: Path, made: Tensors, config: dict[str, Any], shards: int = 0) -> Path:
    """``shards`` > 0 deals the tensors out like cards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(made))}
    for file in files:
        mine = {name: made[name] for name, where in weight_map.items() if where == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def compressed_tensors(
    made: Tensors, modules: Collection[str] = tuple(LINEARS), scales: str = "absmax"
) -> tuple[Tensors, dict[str, Any]]:
    """Each linear with a tensor scale of its own; tensors and config.json."""
    out = {name: value for name, value in made.items() if name.removesuffix(".weight") not in modules}
    for name in modules:
        weight = made[f"{name}.weight"]
        g = encode_scale(float(weight.abs().max()))
        packed = nvfp4.quantize(weight, scales=scales, tensor_scale=1 / g[0])
        out[f"{name}.weight_packed"] = packed.packed
        out[f"{name}.weight_scale"] = packed.block_scales
        out[f"{name}.weight_global_scale"] = g
        out[f"{name}.input_global_scale"] = torch.tensor([100.0])
    quantization = quantization_config(Targets({}, {}))
    return out, {**CONFIG, "quantization_config": quantization}


def modelopt(made: Tensors, modules: Collection[str] = tuple(LINEARS), scales: str = "absmax") -> Tensors:
    """ModelOpt's: decode scales of no dimension, and scales of an FP8 KV cache."""
    out = {name: value for name, value in made.items() if name.removesuffix(".weight") not in modules}
    for name in modules:
        packed = nvfp4.quantize(made[f"{name}.weight"], scales=scales)
        out[f"{name}.weight"] = packed.packed
        out[f"{name}.weight_scale"] = packed.block_scales
        out[f"{name}.weight_scale_2"] = packed.tensor_scale
        out[f"{name}.input_scale"] = torch.tensor(0.01)
        if name.endswith("k_proj"):
            out[f"{name}.k_scale"] = torch.tensor(1.0)
    return out


def save_modelopt(model: Path, out: Path, leave: str) -> Path:
    """The checkpoint in ``model`` as ModelOpt would quantise it, but for the linear ``leave``: parts of a fused layer
    have tensor scales of their own."""
    made = {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    linears = [name.removesuffix(".weight") for name in made if name.endswith("_proj.weight")]
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", leave]}
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": quantization}
    return save(out, modelopt(made, [name for name in linears if name != leave]), config)


MODELOPT = {
    **CONFIG,
    "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
}
MODELOPT_FILE = {
    "producer": {"name": "modelopt"},
    "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16},
}


def fed_back(made: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Codes that make up for each other's errors, as GPTQ's do: a column's error goes into the next one's weight."""
    ready, config = compressed_tensors(made, scales="search")
    for name in LINEARS:
        weight, outer = made[f"{name}.weight"].float(), 1 / ready[f"{name}.weight_global_scale"]
        step = (ready[f"{name}.weight_scale"].float() * outer).repeat_interleave(16, dim=1)
        codes, carried = torch.empty(weight.shape, dtype=torch.uint8), torch.zeros(len(weight))
        grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
        for column in range(weight.shape[1]):
            wanted = weight[:, column] + 0.6 * carried
            magnitude = wanted.abs() / step[:, column].clamp(min=1e-30)
            low = (magnitude[:, None] - grid).abs().argmin(dim=1)
            carried = wanted - (grid[low] * step[:, column]).copysign(wanted)
            codes[:, column] = low.to(torch.uint8) | (wanted.signbit().to(torch.uint8) << 3)
        ready[f"{name}.weight_packed"] = codes[:, ::2] | (codes[:, 1::2] << 4)
    return ready, config
