"""What SGLang does to q, k and v between qkv_proj and attention: norms of heads, RoPE, and the write of the cache."""

from __future__ import annotations

from typing import Any

import torch

from mixquant_sglang.versions.dialect import dialect

_NHD_POOL = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool"


def why_not_plain(rope: Any, size: int) -> str:
    """Why a rotary embedding is not SGLang's JIT kernel, neox style, over all ``size`` elements of a head; empty if it
    is that.  Subclasses that only compute other angles (Llama 3's, YaRN) are."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    name = type(rope).__name__
    if getattr(dialect().forward_method(rope), "__func__", None) is not RotaryEmbedding.forward_cuda:
        return f"its {name} has a forward of its own"
    if not rope.is_neox_style or rope.head_size != size or rope.rotary_dim != size:
        return f"its {name} turns {rope.rotary_dim} of {size} elements{'' if rope.is_neox_style else ', interleaved'}"
    cache = rope.cos_sin_cache
    if rope.use_fallback_kernel or cache.dtype is not torch.float32 or cache.shape[1:] != (size,):
        return f"its {name} takes another kernel"
    return ""


def why_not_rows(pool: Any) -> str:
    """Why the KV cache ``pool`` is not of BF16 rows, one for each slot; empty if it is."""
    kind = type(pool)
    if f"{kind.__module__}.{kind.__qualname__}" != _NHD_POOL:
        return f"its cache is a {kind.__name__}"
    if pool.dtype is not torch.bfloat16 or pool.store_dtype is not torch.bfloat16:
        return f"its cache holds {pool.dtype}"
    if pool.kv_cache_layout != "nhd" or getattr(pool, "requires_physical_write_loc", False):
        return "its cache is not of plain rows"
    return ""


def writes_with_rope(forward_batch: Any) -> bool:
    """Whether SGLang's RoPE may write the cache in the running pass."""
    from sglang.srt.models.utils import enable_fused_set_kv_buffer

    return bool(enable_fused_set_kv_buffer(forward_batch))


def targets(v: torch.Tensor, layer: Any, forward_batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the running pass: the cache's keys and values of ``layer``, [slots, heads * size], and the slots of its
    rows."""
    from sglang.srt.models.utils import create_fused_set_kv_buffer_arg

    arg = create_fused_set_kv_buffer_arg(value=v, layer=layer, forward_batch=forward_batch)
    return arg.k_buffer, arg.v_buffer, arg.cache_loc


def own_steps(
    attention: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    *,
    norm: bool,
    at_once: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's own: ``apply_qk_norm`` if ``norm``, the rotary embedding of ``attention``, and the write, by that
    (``at_once``) or by ``store_cache``.  q [T, Q * size], k, v [T, K * size], which may change; returns q and k."""
    from sglang.kernels.ops.attention.rope import FusedSetKVBufferArg
    from sglang.kernels.ops.kvcache.kvcache import store_cache
    from sglang.srt.models.utils import apply_qk_norm

    if norm:
        q, k = apply_qk_norm(
            q=q,
            k=k,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            head_dim=attention.head_dim,
            alt_stream=attention.alt_stream,
        )
    if at_once:
        arg = FusedSetKVBufferArg(value=v, k_buffer=keys, v_buffer=values, cache_loc=slots)
        return attention.rotary_emb(positions, q, k, fused_set_kv_buffer_arg=arg)  # type: ignore[no-any-return]
    q, k = attention.rotary_emb(positions, q, k)
    width = keys.shape[1] * keys.element_size()
    store_cache(k, v, keys, values, slots, row_bytes=width, v_row_bytes=width, size_limit=len(keys))
    return q, k
