"""Tiny BF16 checkpoints of mixtures of experts, with the names and shapes that families have on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

HIDDEN, INNER, EXPERTS, LAYERS = 64, 48, 4, 2
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """``layer``: name of a MoE layer's experts; ``form``: each, one or transposed; ``leaves``: gate, up, down."""

    layer: str
    form: str = "each"
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    text_config: bool = False

    def experts(self, layer: int) -> str:
        return self.layer.format(layer)


FAMILIES = {
    "qwen3_moe": Family("model.layers.{}.mlp.experts"),
    "mixtral": Family("model.layers.{}.block_sparse_moe.experts", leaves=("w1", "w3", "w2")),
    "qwen3_5_moe": Family("model.language_model.layers.{}.mlp.experts", "one", text_config=True),
    "gemma4": Family("model.language_model.layers.{}.experts", "one", text_config=True),
    "llama4": Family("language_model.model.layers.{}.feed_forward.experts", "transposed", text_config=True),
}


def expert_weights(seed: int = 6) -> Tensors:
    """``LAYER.EXPERT.ROLE`` -> gate and up [I, H], down [H, I]; of very different magnitudes."""
    random = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for i, (role, n, k) in enumerate((("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER))):
                spread = 0.02 * 3 ** ((layer + 2 * expert + i) % 5)
                made[f"{layer}.{expert}.{role}"] = (torch.randn(n, k, generator=random) * spread).bfloat16()
    return made


def names(family: str) -> dict[str, str]:
    """``LAYER.EXPERT.ROLE`` -> the module that it is in a checkpoint with a linear for each."""
    of = FAMILIES[family]
    return {
        f"{layer}.{expert}.{role}": f"{of.experts(layer)}.{expert}.{leaf}"
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for role, leaf in zip(("gate", "up", "down"), of.leaves, strict=True)
    }


def config(family: str) -> dict[str, Any]:
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "num_experts": EXPERTS}
    if FAMILIES[family].text_config:
        return {"model_type": family, "text_config": {"model_type": f"{family}_text", **sizes}}
    return {"model_type": family, **sizes}


def tensors(family: str, weights: Tensors | None = None) -> Tensors:
    """With attention, a router and a shared expert beside the experts."""
    of, weights = FAMILIES[family], weights or expert_weights()
    random = torch.Generator().manual_seed(7)
    made: Tensors = {"model.embed_tokens.weight": torch.randn(32, HIDDEN, generator=random).bfloat16()}
    for layer in range(LAYERS):
        block = of.experts(layer).partition(f"layers.{layer}.")[0] + f"layers.{layer}."
        moe = of.experts(layer).rpartition(".")[0]
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            made[f"{block}self_attn.{leaf}.weight"] = torch.randn(HIDDEN, HIDDEN, generator=random).bfloat16()
        made[f"{moe}.gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=random).bfloat16()
        made[f"{moe}.shared_expert.up_proj.weight"] = torch.randn(INNER, HIDDEN, generator=random).bfloat16()
        for role in ("gate", "up", "down"):
            stacked = torch.stack([weights[f"{layer}.{expert}.{role}"] for expert in range(EXPERTS)])
            if of.form == "each":
                leaf = of.leaves[("gate", "up", "down").index(role)]
                made |= {f"{of.experts(layer)}.{e}.{leaf}.weight": stacked[e].clone() for e in range(EXPERTS)}
            elif role == "down":
                made[f"{of.experts(layer)}.down_proj"] = stacked
            elif role == "up":
                gate = torch.stack([weights[f"{layer}.{expert}.gate"] for expert in range(EXPERTS)])
                made[f"{of.experts(layer)}.gate_up_proj"] = torch.cat([gate, stacked], dim=1)
        if of.form == "transposed":
            for name in ("gate_up_proj", "down_proj"):
                key = f"{of.experts(layer)}.{name}"
                made[key] = made[key].transpose(1, 2).contiguous()
    return made
