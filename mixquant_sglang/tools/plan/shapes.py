"""The matrices of a dense decoder on one GPU of several, and the bytes of its weights and KV cache."""

from __future__ import annotations

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.plan.models import Model


def linear_shapes(model: Model, tp: int) -> list[tuple[str, int, int]]:
    """(name within a layer, N, K) of one rank's four linears, as SGLang fuses them."""
    if model.heads % tp or model.intermediate % tp or (model.kv_heads % tp and tp % model.kv_heads):
        raise MixQuantError(
            f"--tp: {tp} does not divide {model.name} ({model.heads} heads, {model.kv_heads} KV heads, intermediate "
            f"size {model.intermediate}); allowed: a divisor of these"
        )
    q, kv = model.heads // tp * model.head_dim, kv_width(model, tp)
    inner = model.intermediate // tp
    return [
        ("self_attn.qkv_proj", q + 2 * kv, model.hidden),
        ("self_attn.o_proj", model.hidden, q),
        ("mlp.gate_up_proj", 2 * inner, model.hidden),
        ("mlp.down_proj", model.hidden, inner),
    ]


def kv_width(model: Model, tp: int) -> int:
    """Numbers in the keys, or the values, of one token in one layer on one GPU; few heads are held several times."""
    return max(1, model.kv_heads // tp) * model.head_dim


def kv_bytes(model: Model, tp: int) -> int:
    """BF16 keys and values of one token on one GPU."""
    return model.layers * 2 * kv_width(model, tp) * 2


def bf16_bytes(model: Model, tp: int) -> int:
    """BF16 weights on one GPU: linears, embeddings and an lm_head of its own."""
    linears = model.layers * sum(n * k for _, n, k in linear_shapes(model, tp))
    return 2 * (linears + (1 if model.tied else 2) * model.vocab * model.hidden // tp)
