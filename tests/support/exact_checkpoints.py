"""Checkpoints whose linears FP8 or NVFP4 holds exactly: what packs them gives the same numbers back."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mixquant_sglang.formats import nvfp4

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))


def fp8_exact(weight: torch.Tensor) -> torch.Tensor:
    """Each row on the grid of E4M3 by a power of two, and its largest number at the grid's end, so that this power is
    what 448 is divided by."""
    wide = weight.float()
    place = wide.abs().argmax(dim=1, keepdim=True)
    power = torch.exp2(torch.ceil(torch.log2(wide.abs().amax(dim=1, keepdim=True) / 448)))
    codes = (wide / power).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    codes.scatter_(1, place, 448 * wide.gather(1, place).sign())
    return (codes * power).to(torch.bfloat16)


def nvfp4_exact(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the parts of a fused weight, with one tensor scale, a power of two: one number is the largest of the grid."""
    largest = max(float(w.abs().max()) for w in weights)
    scale = 2.0 ** math.ceil(math.log2(largest / (6 * 448)))
    made = [nvfp4.quantize(w, tensor_scale=scale).dequantize(torch.bfloat16) for w in weights]
    made[0][0, :16] = 0
    made[0][0, 0] = 6 * 448 * scale
    return made


def write(model: Path, folder: Path, fmt: str) -> Path:
    """A copy of the checkpoint ``model`` in ``folder``, its linears exact in ``fmt``, fp8 or nvfp4."""
    shutil.copytree(model, folder)
    files = {file: load_file(file) for file in folder.glob("*.safetensors")}
    tensors = {name: file for file, found in files.items() for name in found}
    for first in [name for name in tensors if name.endswith(tuple(f"{group[0]}.weight" for group in FUSED))]:
        block, _, leaf = first.removesuffix(".weight").rpartition(".")
        group = next(group for group in FUSED if group[0] == leaf)
        names = [f"{block}.{part}.weight" for part in group]
        weights = [files[tensors[name]][name] for name in names]
        exact = [fp8_exact(w) for w in weights] if fmt == "fp8" else nvfp4_exact(weights)
        for name, weight in zip(names, exact, strict=True):
            files[tensors[name]][name] = weight.contiguous()
    for file, found in files.items():
        save_file(found, file, metadata={"format": "pt"})
    return folder
