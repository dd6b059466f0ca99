"""The matrices of a plain dense decoder on one GPU of several: those that ``mixquant sensitivity`` prices."""

from __future__ import annotations

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.mixers import Matrix


def linear_shapes(model: Decoder, tp: int) -> list[Matrix]:
    """One rank's four linears of each layer, as SGLang fuses them. MixQuantError for a model whose blocks differ."""
    model.check(tp)
    if not model.is_plain:
        raise MixQuantError(f"MODEL: {model.name}: has experts, hybrid or windowed blocks; allowed: plain dense models")
    return model.blocks[0].matrices(model.hidden, tp)
