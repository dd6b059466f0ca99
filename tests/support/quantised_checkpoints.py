"""Small quantised checkpoints in the layouts of those that people serve, and the same weights multiplied out to BF16.

All scales are powers of two, so that BF16 holds each weight exactly.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixquant_sglang.formats import nvfp4
from mixquant_sglang.tools.quantize.configs import quantization_config
from mixquant_sglang.tools.quantize.targets import Targets

Tensors = dict[str, torch.Tensor]
LEFT = "model.layers.0.self_attn.o_proj"  # in BF16
MODELOPT_NVFP4 = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
_GROUP = {"targets": ["Linear"], "weights": _WEIGHTS, "input_activations": {**_WEIGHTS, "strategy": "token"}}
CONFIGS: dict[str, dict[str, Any]] = {
    "nvfp4 parts": quantization_config(Targets({}, {})),
    "nvfp4 modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", LEFT]},
    "fp8 rows": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": _GROUP},
    },
    "fp8 tensor": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    "fp8 blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}


def power(amax: torch.Tensor) -> torch.Tensor:
    """The least power of two by which 448 is at least ``amax``."""
    return torch.exp2(torch.ceil(torch.log2(amax.float().clamp(min=1e-6) / 448)))


def _fp8(weight: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = (weight.float() / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, (codes.float() * scales).bfloat16()


def fp8_rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = power(weight.abs().amax(dim=1, keepdim=True))
    codes, values = _fp8(weight, scales)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales.bfloat16()}, values


def fp8_tensor(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = power(weight.abs().amax())
    codes, values = _fp8(weight, scale)
    made = {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(0.25)}
    if name.endswith(("k_proj", "v_proj")):
        made[f"{name}.{name[-6]}_scale"] = torch.tensor(1.5)
    return made, values


def fp8_blocks(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    n, k = weight.shape
    padded = torch.zeros(math.ceil(n / 128) * 128, math.ceil(k / 128) * 128)
    padded[:n, :k] = weight.float()
    blocks = padded.view(len(padded) // 128, 128, -1, 128)
    scales = power(blocks.abs().amax(dim=(1, 3)))
    codes, values = _fp8(weight, scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k])
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, values


def nvfp4_parts(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """With a tensor scale of its own: compressed-tensors'."""
    scale = 2.0 ** math.ceil(math.log2(float(weight.abs().max()) / (6 * 448)))
    scale *= 4.0 if name.endswith(("k_proj", "up_proj")) else 1.0
    made = nvfp4.quantize(weight, tensor_scale=scale)
    return {
        f"{name}.weight_packed": made.packed,
        f"{name}.weight_scale": made.block_scales,
        f"{name}.weight_global_scale": torch.tensor([1 / scale]),
        f"{name}.input_global_scale": torch.tensor([100.0]),
    }, made.dequantize(torch.bfloat16)


def nvfp4_modelopt(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """With one tensor scale for all: ModelOpt's."""
    made = nvfp4.quantize(weight, tensor_scale=2.0**-10)
    tensors = {
        f"{name}.weight": made.packed,
        f"{name}.weight_scale": made.block_scales,
        f"{name}.weight_scale_2": made.tensor_scale,
        f"{name}.input_scale": torch.tensor(0.01),
    }
    if name.endswith("k_proj"):
        tensors[f"{name}.k_scale"] = torch.tensor(1.0)
    return tensors, made.dequantize(torch.bfloat16)


WRITERS: dict[str, Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]] = {
    "nvfp4 parts": nvfp4_parts,
    "nvfp4 modelopt": nvfp4_modelopt,
    "fp8 rows": fp8_rows,
    "fp8 tensor": fp8_tensor,
    "fp8 blocks": fp8_blocks,
}


def write(model: Path, folder: Path, kind: str, *, beside: bool = False) -> tuple[Path, Path]:
    """The BF16 checkpoint ``model`` quantised, but for ``LEFT``, and the same multiplied out; ``beside``: its config in
    a file of its own, as ModelOpt's first ones have it."""
    tensors = {n: t for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}
    quantised: Tensors = {}
    plain: Tensors = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or module == LEFT:
            quantised[name] = plain[name] = tensor
            continue
        made, values = WRITERS[kind](module, tensor)
        quantised |= made
        plain[name] = values
    config = json.loads((model / "config.json").read_text())
    more: dict[str, Any] = {} if beside else {"quantization_config": CONFIGS[kind]}
    out = _save(model, folder / "quantised", quantised, {**config, **more})
    if beside:
        said = {"producer": {"name": "modelopt"}, "quantization": MODELOPT_NVFP4}
        (out / "hf_quant_config.json").write_text(json.dumps(said))
    return out, _save(model, folder / "plain", plain, config)


def _save(model: Path, folder: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edited(model: Path, folder: Path, kind: str, edit: Callable[[Tensors], object]) -> Path:
    """The quantised checkpoint of ``write`` with other tensors."""
    out, _ = write(model, folder, kind)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def without(model: Path, folder: Path, kind: str, *modules: str) -> Path:
    """The same without any tensor of ``modules``."""

    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.rpartition(".")[0] in modules]:
            del tensors[name]

    return edited(model, folder, kind, drop)
