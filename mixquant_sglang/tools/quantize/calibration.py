"""The inputs of each linear over a file of samples, for ``mixquant quantize --calibration``: the largest magnitude, and
the mean square of each column.

Runs the whole model with transformers, so it needs the memory for it; refuses models whose linears transformers names
differently, samples that are not ``{"text": ...}`` or ``{"messages": [...]}``, and inputs that are NaN or infinite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from mixquant_sglang.errors import MixQuantError

TOKENS = 2048  # of each sample


def read_samples(path: Path) -> list[dict[str, Any]]:
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise MixQuantError(f"{path}:{number}: is not JSON: {error}") from None
        text = sample.get("text", sample.get("messages")) if isinstance(sample, dict) else None
        if not isinstance(text, str | list) or not text:
            raise MixQuantError(f'{path}:{number}: a line is {{"text": "..."}} or {{"messages": [...]}}')
        samples.append(sample)
    if not samples:
        raise MixQuantError(f"{path}: has no samples")
    return samples


def load_model(folder: Path, device: str) -> tuple[Any, Any]:
    """The BF16 model of transformers, ready to run, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(device).eval(), tokenizer


def token_ids(tokenizer: Any, sample: dict[str, Any], *, open_turn: bool = False) -> torch.Tensor:
    """[1, tokens] of one sample; ``open_turn``: a conversation ends where the model's answer would begin."""
    text = sample.get("text")
    if text is None:
        text = tokenizer.apply_chat_template(
            sample["messages"], tools=sample.get("tools"), tokenize=False, add_generation_prompt=open_turn
        )
    ids: torch.Tensor = tokenizer(text, add_special_tokens="text" in sample, return_tensors="pt").input_ids
    return ids


@dataclass(frozen=True)
class Inputs:
    """By module: ``amax``, the largest magnitude, shared over its fused group; ``energy`` float32 [K], the mean square
    of each column over all tokens. Both are 0 for a module that no token reached (an expert)."""

    amax: dict[str, float]
    energy: dict[str, torch.Tensor]


def measure_inputs(
    folder: Path, samples: list[dict[str, Any]], quantised: Mapping[str, tuple[str, ...]], device: str
) -> Inputs:
    """Over the samples' first 2048 tokens each; ``quantised``: module -> its fused group."""
    model, tokenizer = load_model(folder, device)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if missing := [module for module in quantised if module not in linears]:
        raise MixQuantError(
            f"--calibration: transformers has no linear {missing[0]} in {type(model).__name__} (it holds experts in "
            "one tensor, or names layers in its own way); leave --calibration out"
        )
    amax = {name: torch.zeros((), device=device) for name in quantised}
    squares = {name: torch.zeros(linears[name].in_features, dtype=torch.float64, device=device) for name in quantised}
    tokens = dict.fromkeys(quantised, 0)

    def note(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            if len(x):
                amax[name] = torch.maximum(amax[name], x.abs().amax())
                squares[name] += x.square().sum(dim=0, dtype=torch.float64)
                tokens[name] += len(x)

        return hook

    for name in quantised:
        linears[name].register_forward_pre_hook(note(name))
    with torch.inference_mode():
        for sample in tqdm(samples, desc="calibration", disable=None):
            model.base_model(input_ids=token_ids(tokenizer, sample)[:, :TOKENS].to(device), use_cache=False)
    energy = {name: (total / max(tokens[name], 1)).float().cpu() for name, total in squares.items()}
    if bad := next((name for name in quantised if not (amax[name].isfinite() and energy[name].isfinite().all())), None):
        raise MixQuantError(f"--calibration: the input of {bad} is NaN or infinity; check the checkpoint")
    return Inputs({name: max(float(amax[member]) for member in group) for name, group in quantised.items()}, energy)
