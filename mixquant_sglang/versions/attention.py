"""Attention of some rows of a pass."""

from __future__ import annotations

import dataclasses
from typing import Any

from mixquant_sglang.passes.queries import Queries

_FLASH_ATTENTION = "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend"
_RADIX_ATTENTION = "sglang.srt.layers.radix_attention.RadixAttention"
# What makes its extend attention more than causal attention over a paged cache of keys and values (0.5.17, 0.5.23).
_SPECIAL_BACKEND = (
    "use_mla",
    "is_encoder_decoder",
    "has_swa",
    "is_prefill_aware_swa",
    "use_sliding_window_kv_pool",
    "has_local_attention",
    "local_attn_builder",
    "fa_skip_kv_cache",
    "kv_cache_is_mxfp8",
    "_kv_shard_pool",
)
_SPECIAL_METADATA = (
    "local_attn_metadata",
    "swa_spec_metadata",
    "image_token_ranges",
    "scheduler_metadata",
)


def attends_whole(backend: Any, attention: Any) -> str:
    """Why ``backend`` is not asked for some query rows of ``attention`` alone; empty if it can be.

    FA3's kernel takes queries and keys of any lengths and aligns the ends of both, so that fewer queries, the last of
    each request, see the keys that they saw before.
    """
    name = _class_name(backend)
    if name != _FLASH_ATTENTION or backend.fa_impl_ver != 3:
        version = f" {backend.fa_impl_ver}" if name == _FLASH_ATTENTION else ""
        return f"the attention back end is {type(backend).__name__}{version}, not FlashAttention 3"
    special = [name for name in _SPECIAL_BACKEND if getattr(backend, name, None)]
    if _class_name(attention) != _RADIX_ATTENTION:
        special.append(type(attention).__name__)
    else:
        special += [name for name in ("is_cross_attention", "use_irope") if getattr(attention, name)]
        special += ["sliding_window_size"] if attention.sliding_window_size not in (None, -1) else []
        special += [f"attn_type {attention.attn_type.value}"] if attention.attn_type.value != "decoder" else []
    return f"it is not plain causal attention ({', '.join(special)})" if special else ""


def metadata_of_queries(backend: Any, queries: Queries) -> Any | None:
    """``forward_metadata`` of FA3's back end for ``queries`` instead of all rows of the pass; None if it holds more
    than what plain causal attention needs."""
    metadata = backend.forward_metadata
    if any(getattr(metadata, name, None) is not None for name in _SPECIAL_METADATA):
        return None
    if metadata.cu_seqlens_q is None or len(metadata.cu_seqlens_q) != queries.requests + 1:
        return None
    return dataclasses.replace(metadata, cu_seqlens_q=queries.starts, max_seq_len_q=queries.longest)


def _class_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
