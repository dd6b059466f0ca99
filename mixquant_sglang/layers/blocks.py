"""What is safe in which block of a model: ``families.py`` has a row for each family that was read.

Fusion, contiguous q and leaving out rows change what is passed between the modules of a block, so they are for classes
whose ``forward`` was read, by exact type: a subclass may do anything.  A model of no row is served all the same, with
every linear by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch

from mixquant_sglang.layers.families import FAMILIES, Family
from mixquant_sglang.layers.linear import MixQuantLinearMethod


def is_decoder(module: torch.nn.Module) -> bool:
    return _decoder_family(module) is not None


def is_mlp(module: torch.nn.Module) -> bool:
    return _name(module) in {family.mlp for family in FAMILIES}


def is_attention(module: torch.nn.Module) -> bool:
    return _name(module) in {family.attention for family in FAMILIES}


def is_model(module: torch.nn.Module) -> bool:
    return model_family(module) is not None


def is_by_rows(module: torch.nn.Module) -> bool:
    """Whether it may run on picked rows (``Family.by_rows``)."""
    return any(_name(module) in family.by_rows for family in FAMILIES)


def backbone(model: Any) -> Any:
    """What has the ``layers`` and the last ``norm`` of a model for which ``is_model`` holds."""
    family = model_family(model)
    assert family is not None
    return attrgetter(family.backbone)(model)


def attention_of(layer: Any) -> Any:
    """What has qkv_proj and o_proj: Qwen3.5's layers have them themselves."""
    return getattr(layer, "self_attn", layer)


def rope_of(attention: torch.nn.Module) -> str | None:
    """``Family.rope`` of an attention block."""
    name = _name(attention)
    return next((family.rope for family in FAMILIES if family.attention == name), None)


def takes_q_apart(attention: Any) -> bool:
    """Whether q may be a matrix of its own there: one kernel for norm and RoPE (Qwen3-MoE) reads qkv whole."""
    return is_attention(attention) and not getattr(attention, "use_fused_qk_norm_rope", False)


def model_family(model: torch.nn.Module) -> Family | None:
    """The family that says how the rows of the model's last layer are read, if one does."""
    name = _name(model)
    return next((family for family in FAMILIES if family.model == name), None)


def _decoder_family(layer: torch.nn.Module) -> Family | None:
    name = _name(layer)
    return next((family for family in FAMILIES if family.decoder == name), None)


def _name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def fusable_method(linear: Any) -> MixQuantLinearMethod | None:
    """Our method of ``linear``, where its kernel takes activations that were quantised before."""
    method = getattr(linear, "quant_method", None)
    if not isinstance(method, MixQuantLinearMethod) or method.whole or not method.activation_format:
        return None
    return method


def norms(layer: Any) -> Iterator[tuple[Any, MixQuantLinearMethod]]:
    """Norms of a decoder layer whose results may be handed over quantised, each with the method of its reader."""
    family = _decoder_family(layer)
    for norm, reader in family.norms if family else ():
        if reader.startswith("mlp.") and not is_mlp(layer.mlp):
            continue  # experts, whose gate reads the norm's result too
        method = fusable_method(attrgetter(reader)(layer))
        if method:
            yield attrgetter(norm)(layer), method
