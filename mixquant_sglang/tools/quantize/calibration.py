"""The inputs of each linear over a file of samples, for ``mixquant quantize --calibration``: the largest magnitude, and
the mean square of each column.

Runs the whole model with transformers, so it needs the memory for it; refuses models whose linears or experts
transformers has in another way, samples that are not ``{"text": ...}`` or ``{"messages": [...]}``, and inputs that are
NaN or infinite.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.modules import EXPERT_LEAVES, block_of, expert_of
from mixquant_sglang.tools.progress import Bar
from mixquant_sglang.tools.quantize import model_experts
from mixquant_sglang.tools.quantize.model_experts import ModelExperts
from mixquant_sglang.weights.names import Names

TOKENS = 2048  # of each sample
_DOWN = {down for _, _, down in EXPERT_LEAVES}


def read_samples(path: Path) -> list[dict[str, Any]]:
    samples = []
    # JSON strings may hold characters at which splitlines() ends a line too, U+2028 and U+0085 among them.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
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


def load_model(folder: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """The model of transformers, ready to run in ``dtype``, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
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
    """By module: ``amax``, the largest magnitude, shared over its fused group, or over the experts of its layer;
    ``energy`` float32 [K], the mean square of each column over all tokens; 0 for an expert that no token reached."""

    amax: dict[str, float]
    energy: dict[str, torch.Tensor]


def measure_inputs(
    folder: Path, samples: list[dict[str, Any]], quantised: Mapping[str, tuple[str, ...]], device: str
) -> Inputs:
    """Over the samples' first 2048 tokens each; ``quantised``: module -> its fused group. The largest magnitude is that
    of all experts of a layer, to which engines give one scale; one that few tokens reach has it from the others."""
    model, tokenizer = load_model(folder, device)
    linears, layers = _linears(model, quantised), _layers(model, quantised)
    columns = {name: linear.in_features for name, linear in linears.items()}
    groups = dict(quantised)
    for experts, modules in layers:
        hidden, inner = (weight.shape[1] for weight in experts.weights(0))
        for names, k in ((modules.first, hidden), (modules.down, inner)):
            alike = tuple(name for of_one in names.values() for name in of_one)
            columns |= dict.fromkeys(alike, k)
            groups |= dict.fromkeys(alike, alike)
    noted = _Noted(columns, device)
    for name, linear in linears.items():
        linear.register_forward_pre_hook(noted.hook(name))
    for experts, modules in layers:
        experts.module.register_forward_pre_hook(noted.hook_of_experts(experts, modules))
    with torch.inference_mode():
        for sample in Bar(samples, desc="calibration"):
            model.base_model(input_ids=token_ids(tokenizer, sample)[:, :TOKENS].to(device), use_cache=False)
    amax, energy = noted.amax, noted.energy()
    if bad := next((name for name in quantised if not (amax[name].isfinite() and energy[name].isfinite().all())), None):
        raise MixQuantError(f"--calibration: the input of {bad} is NaN or infinity; check the checkpoint")
    most = {group: max(float(amax[member]) for member in group) for group in set(groups.values())}
    return Inputs({name: most[group] for name, group in groups.items()}, energy)


@dataclass
class _Modules:
    """The checkpoint's linears of a layer's experts, by expert: gate and up, and down."""

    first: dict[int, tuple[str, ...]]
    down: dict[int, tuple[str, ...]]


class _Noted:
    """What has been seen of the inputs of modules; ``columns``: K of each."""

    def __init__(self, columns: Mapping[str, int], device: str) -> None:
        self.amax = {name: torch.zeros((), device=device) for name in columns}
        self._squares = {name: torch.zeros(k, dtype=torch.float64, device=device) for name, k in columns.items()}
        self._tokens = dict.fromkeys(columns, 0)

    def add(self, names: Iterable[str], inputs: torch.Tensor) -> None:
        """``inputs`` [..., K] of each of ``names``."""
        x = inputs.flatten(0, -2).float()
        if len(x):
            most, squares = x.abs().amax(), x.square().sum(dim=0, dtype=torch.float64)
            for name in names:
                self.amax[name] = torch.maximum(self.amax[name], most)
                self._squares[name] += squares
                self._tokens[name] += len(x)

    def energy(self) -> dict[str, torch.Tensor]:
        return {name: (total / max(self._tokens[name], 1)).float().cpu() for name, total in self._squares.items()}

    def hook(self, name: str) -> Callable[..., None]:
        def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.add((name,), inputs[0])

        return note

    def hook_of_experts(self, experts: ModelExperts, modules: _Modules) -> Callable[..., None]:
        def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for expert, x in experts.routed(inputs[0], inputs[1]):
                self.add(modules.first[expert], x)
                self.add(modules.down[expert], experts.between(x, expert))

        return note


def _linears(model: Any, quantised: Iterable[str]) -> dict[str, torch.nn.Linear]:
    """The checkpoint's modules, but for experts, as transformers has them."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = Names(f"{name}.weight" for name in own)
    found = {module: own.get(names.of(module)) for module in quantised if expert_of(module) is None}
    if missing := next((module for module, linear in found.items() if linear is None), None):
        raise MixQuantError(
            f"--calibration: transformers has no linear {missing} in {type(model).__name__} (it names layers in its "
            "own way); leave --calibration out"
        )
    return {module: linear for module, linear in found.items() if linear is not None}


def _layers(model: Any, quantised: Iterable[str]) -> list[tuple[ModelExperts, _Modules]]:
    """Each MoE layer of the checkpoint that has experts among ``quantised``, as transformers has it, and those."""
    layers: dict[str, _Modules] = {}
    for module in quantised:
        if found := expert_of(module):
            layer, expert, leaf = found
            of_layer = layers.setdefault(layer, _Modules({}, {}))
            names = of_layer.down if leaf in _DOWN else of_layer.first
            names[expert] = (*names.get(expert, ()), module)
    if not layers:
        return []
    own = model_experts.find(model)
    paired = []
    for layer, modules in layers.items():
        experts = own.get(block_of(f"{layer}.") or 0)
        if experts is None or experts.count != len(modules.down):
            raise MixQuantError(
                f"--calibration: transformers has no {len(modules.down)} experts for {layer} in "
                f"{type(model).__name__}; leave --calibration out"
            )
        paired.append((experts, modules))
    return paired
