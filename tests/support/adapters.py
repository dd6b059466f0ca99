"""LoRA adapters of random numbers, and what a model with them computes, by transformers and plain torch.

An adapter is in PEFT's format.  ``Reference`` knows nothing of SGLang: of each linear it has the rows that are prompt
rows computed by the reference of a format (``mixquant_sglang/formats``) where it is asked to, all others in BF16.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mixquant_sglang.formats import fp8, nvfp4

RANK, ALPHA = 8, 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
# What SGLang multiplies together, and so has one tensor scale in NVFP4.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_PARENT = {name: "self_attn" if name in ATTENTION else "mlp" for name in ALL}


def make(model: Path, folder: Path, *, seed: int, targets: Sequence[str] = ALL, strength: float = 0.02) -> Path:
    """An adapter on ``targets`` of all layers, whose products are about ``strength`` of an input's size."""
    config = json.loads((model / "config.json").read_text())
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    sizes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    sizes |= {"o_proj": (hidden, queries), "down_proj": (hidden, inner)}
    sizes |= dict.fromkeys(("gate_proj", "up_proj"), (inner, hidden))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name in targets:
            rows, columns = sizes[name]
            prefix = f"base_model.model.model.layers.{layer}.{_PARENT[name]}.{name}"
            a = torch.randn(RANK, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, RANK, generator=generator) * strength
            tensors[f"{prefix}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = b.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    about |= {"target_modules": [*targets], "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def prompts(count: int, length: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(20, 4000) for _ in range(length + 7 * i)] for i in range(count)]


class Reference:
    """Of one checkpoint like Qwen3's, in BF16 on ``device``."""

    def __init__(self, model: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device).eval()
        self._layers = [*self._model.model.layers]
        self._plain = {
            (i, name): getattr(getattr(layer, _PARENT[name]), name).weight.detach().clone()
            for i, layer in enumerate(self._layers)
            for name in ALL
        }

    def log_probs(
        self, ids: Sequence[int], prompt: int, *, adapter: Path | None = None, low: str | None = None
    ) -> torch.Tensor:
        """float32 [len(ids) - prompt + 1, vocabulary], of the tokens after the first ``prompt`` of ``ids``.

        Without ``low`` the adapter is merged into the weights.  With "fp8" or "nvfp4" all prompt rows but the last take
        the format, without the adapter, whose own product is added in BF16."""
        deltas = self._deltas(adapter)
        for index in range(len(self._layers)):
            for group in _GROUPS:
                self._set(index, group, deltas, prompt - 1 if low else 0, low)
        with torch.no_grad():
            logits = self._model(torch.tensor([[*ids]], device=self.device)).logits[0, prompt - 1 :]
        return logits.float().log_softmax(-1).cpu()  # type: ignore[no-any-return]

    def _deltas(self, adapter: Path | None) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        if adapter is None:
            return {}
        tensors, deltas = load_file(adapter / "adapter_model.safetensors", device=self.device), {}
        for index, name in self._plain:
            prefix = f"base_model.model.model.layers.{index}.{_PARENT[name]}.{name}"
            if f"{prefix}.lora_A.weight" in tensors:
                deltas[index, name] = tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"]
        return deltas

    def _set(
        self,
        index: int,
        group: tuple[str, ...],
        deltas: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]],
        low_rows: int,
        low: str | None,
    ) -> None:
        quantised = _dequantised(torch.cat([self._plain[index, name] for name in group]), low) if low else None
        start = 0
        for name in group:
            linear: Any = getattr(getattr(self._layers[index], _PARENT[name]), name)
            weight, delta = self._plain[index, name], deltas.get((index, name))
            part = None if quantised is None else quantised[start : start + len(weight)]
            start += len(weight)
            if low is None and delta is not None:
                weight = (weight.float() + ALPHA / RANK * delta[1].float() @ delta[0].float()).to(torch.bfloat16)
                delta = None
            linear.weight.data = weight
            linear.forward = MethodType(_forward(weight, part, delta, low_rows, low), linear)


def _dequantised(weight: torch.Tensor, low: str) -> torch.Tensor:
    made = fp8.quantize(weight) if low == "fp8" else nvfp4.quantize(weight)
    return made.dequantize(torch.float32)


def _forward(
    weight: torch.Tensor,
    quantised: torch.Tensor | None,
    delta: tuple[torch.Tensor, torch.Tensor] | None,
    low_rows: int,
    low: str | None,
) -> Any:
    """Of a linear whose first ``low_rows`` rows take the format ``low``."""

    def forward(_linear: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.linear(x, weight)
        if quantised is not None:
            rows = x[0, :low_rows].contiguous()
            made = fp8.quantize_activations(rows) if low == "fp8" else nvfp4.quantize_activations(rows)
            out[0, :low_rows] = (made.dequantize(torch.float32) @ quantised.t()).to(out.dtype)
        if delta is not None:
            out = out + (x.float() @ delta[0].float().t() @ delta[1].float().t() * (ALPHA / RANK)).to(out.dtype)
        return out

    return forward
