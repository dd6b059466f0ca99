"""Which families of models we know block by block, and what is safe there: one row a family.

Fusion, contiguous q and leaving out rows change what is passed between the modules of a block, so they are for classes
whose ``forward`` was read, by exact type: a subclass may do anything.  A model of no row is served all the same, with
every linear by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mixquant_sglang.layers.linear import MixQuantLinearMethod


@dataclass(frozen=True)
class Family:
    """Full class names in SGLang, each of which allows something; None allows nothing.  ``why``: what was read that
    makes them safe, and what was seen to be harmless.

    ``decoder``: the results of both norms go to qkv_proj and gate_up_proj alone, so they may be handed over quantised.
    ``mlp``: the result of act_fn goes to down_proj alone.
    ``attention``: takes the result of qkv_proj apart with ``split`` and does nothing else with it, so q may be a matrix
    of its own; its result goes to o_proj alone, row by row.
    ``model``: logits come from ``logits_processor(norm(last layer))`` and nothing else, so of the last layer's rows
    those that nobody samples from may be left out.
    """

    name: str
    why: str
    decoder: str | None = None
    mlp: str | None = None
    attention: str | None = None
    model: str | None = None


FAMILIES = (
    Family(
        "Llama",
        "On CUDA and the CPU the attention's forward_prepare_native splits qkv and applies RoPE to q and k; the NPU's "
        "path, which reads qkv whole, is not ours.  Both norms' results go to self_attn and mlp, which begin with "
        "qkv_proj and gate_up_proj.",
        decoder="sglang.srt.models.llama.LlamaDecoderLayer",
        mlp="sglang.srt.models.llama.LlamaMLP",
        attention="sglang.srt.models.llama.LlamaAttention",
        model="sglang.srt.models.llama.LlamaForCausalLM",
    ),
    Family(
        "Qwen2",
        "As Llama; qkv_proj has a bias, which our products take.",
        decoder="sglang.srt.models.qwen2.Qwen2DecoderLayer",
        mlp="sglang.srt.models.qwen2.Qwen2MLP",
        attention="sglang.srt.models.qwen2.Qwen2Attention",
        model="sglang.srt.models.qwen2.Qwen2ForCausalLM",
    ),
    Family(
        "Qwen3",
        "As Llama, with q_norm and k_norm behind the split, of each head by itself; the NPU's path and aiter's fused "
        "one (ROCm), which read qkv whole, are not ours.",
        decoder="sglang.srt.models.qwen3.Qwen3DecoderLayer",
        mlp="sglang.srt.models.qwen2.Qwen2MLP",  # which Qwen3 takes from Qwen2
        attention="sglang.srt.models.qwen3.Qwen3Attention",
        model="sglang.srt.models.qwen3.Qwen3ForCausalLM",
    ),
)


def is_decoder(module: torch.nn.Module) -> bool:
    return _name(module) in {family.decoder for family in FAMILIES}


def is_mlp(module: torch.nn.Module) -> bool:
    return _name(module) in {family.mlp for family in FAMILIES}


def is_attention(module: torch.nn.Module) -> bool:
    return _name(module) in {family.attention for family in FAMILIES}


def is_model(module: torch.nn.Module) -> bool:
    return _name(module) in {family.model for family in FAMILIES}


def _name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def fusable_method(linear: Any) -> MixQuantLinearMethod | None:
    """Our method of ``linear``, where its kernel takes activations that were quantised before."""
    method = getattr(linear, "quant_method", None)
    return method if isinstance(method, MixQuantLinearMethod) and method.activation_format else None


def norms(layer: Any) -> Iterator[tuple[Any, MixQuantLinearMethod]]:
    """Norms of a decoder layer whose results may be handed over quantised, each with the method of its reader."""
    pairs = [(layer.input_layernorm, layer.self_attn.qkv_proj)]
    if is_mlp(layer.mlp):
        pairs.append((layer.post_attention_layernorm, layer.mlp.gate_up_proj))
    for norm, linear in pairs:
        method = fusable_method(linear)
        if method:
            yield norm, method
