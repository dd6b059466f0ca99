"""Attention of some rows of a pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mixquant_sglang.passes.queries import Queries

_FLASH_ATTENTION = "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend"
_TORCH_NATIVE = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
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
# What makes it read keys and values from anywhere else, or in another form.
PAGED = "flash_attn_with_kvcache"  # FlashAttention over pages, by the name that FA3's back end calls it by
_CACHE_OF_BF16 = ("auto", "bf16", "bfloat16")  # --kv-cache-dtype
_UNPAGED_BACKEND = ("use_mla", "fa_skip_kv_cache", "kv_cache_is_mxfp8", "_kv_shard_pool", "is_encoder_decoder")
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
    reason = _not_flash_attention_3(backend)
    if reason:
        return reason
    special = [name for name in _SPECIAL_BACKEND if getattr(backend, name, None)]
    special += _special(attention)
    return f"it is not plain causal attention ({', '.join(special)})" if special else ""


def attends_plainly(attention: Any) -> bool:
    """Whether a layer's attention is causal, over all keys of its own requests, with no cap on its logits."""
    return not _special(attention) and not attention.logit_cap


def why_special(attention: Any) -> str:
    """What makes a layer's attention more than ``attends_plainly`` asks for; empty if nothing does."""
    special = _special(attention)
    return ", ".join(special + (["logit_cap"] if not special and attention.logit_cap else []))


def is_attention_layer(module: Any) -> bool:
    """Whether it is SGLang's own layer of attention over cached keys and values."""
    return _class_name(module) == _RADIX_ATTENTION


def prefill_part(backend: Any) -> Any:
    """The one of ``backend``'s that runs prefill's attention over all keys."""
    backend = getattr(backend, "full_attn_backend", backend)  # of models that have other layers too
    return getattr(backend, "prefill_backend", backend)  # where decode has another


def is_torch_native(backend: Any) -> bool:
    return _class_name(backend) == _TORCH_NATIVE and not backend.use_sliding_window_kv_pool


def cached_keys(backend: Any, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of SGLang's torch_native back end: keys and values of a layer, [slots, heads, size]."""
    pool = backend.token_to_kv_pool
    return pool.get_key_buffer(layer_id), pool.get_value_buffer(layer_id)


def slots_of_request(backend: Any, forward_batch: Any, number: int, tokens: int) -> torch.Tensor:
    """Of SGLang's torch_native back end: where the first ``tokens`` tokens of a request lie, [tokens]."""
    row = forward_batch.req_pool_indices[number]
    return backend.req_to_token_pool.req_to_token[row, :tokens]  # type: ignore[no-any-return]


def is_plain_pass(backend: Any) -> bool:
    """Whether the running pass of FA3's back end is causal attention and nothing more."""
    metadata = backend.forward_metadata
    return all(getattr(metadata, name, None) is None for name in _SPECIAL_METADATA)


@contextmanager
def instead_of_pages(names: dict[str, Any], function: Callable[..., Any]) -> Iterator[None]:
    """``names``: of ``extend_namespace``.  SGLang's back end looks ``flash_attn_with_kvcache`` up in its module each
    time that it calls it."""
    paged = names[PAGED]
    names[PAGED] = function
    try:
        yield
    finally:
        names[PAGED] = paged


def reads_pages(backend: Any) -> str:
    """Why prefill of ``backend`` does not read keys and values of BF16 out of pages with FlashAttention 3; empty if it
    does."""
    reason = _not_flash_attention_3(backend)
    special = [name for name in _UNPAGED_BACKEND if getattr(backend, name, None)]
    if not reason and special:
        reason = f"its keys and values are not of plain pages ({', '.join(special)})"
    if not reason and PAGED not in extend_namespace(backend):
        reason = f"its forward_extend, of another module, calls no {PAGED}"
    if not reason and backend.kv_cache_dtype_str not in _CACHE_OF_BF16:
        reason = f"its keys and values are {backend.kv_cache_dtype_str}"
    return reason


def extend_namespace(backend: Any) -> dict[str, Any]:
    """The globals of ``backend``'s own ``forward_extend``."""
    return type(backend).forward_extend.__globals__  # type: ignore[no-any-return]


def prefill_attention(args: Any) -> str | None:
    """The attention back end of prefill by its name in SGLang's resolved arguments."""
    return getattr(args, "prefill_attention_backend", None) or args.attention_backend  # type: ignore[no-any-return]


def caches_bf16(args: Any) -> bool:
    """Whether keys and values are kept in the model's BF16."""
    return args.kv_cache_dtype in _CACHE_OF_BF16


def flash_attention_3() -> tuple[Any, Any]:
    """SGLang's ``flash_attn_with_kvcache`` and ``flash_attn_varlen_func``."""
    from sglang.kernels.ops.attention import flash_attention

    return flash_attention.flash_attn_with_kvcache, flash_attention.flash_attn_varlen_func


def _not_flash_attention_3(backend: Any) -> str:
    name = _class_name(backend)
    if name == _FLASH_ATTENTION and backend.fa_impl_ver == 3:
        return ""
    version = f" {backend.fa_impl_ver}" if name == _FLASH_ATTENTION else ""
    return f"the attention back end is {type(backend).__name__}{version}, not FlashAttention 3"


def _special(attention: Any) -> list[str]:
    if _class_name(attention) != _RADIX_ATTENTION:
        return [type(attention).__name__]
    special = [name for name in ("is_cross_attention", "use_irope") if getattr(attention, name)]
    special += ["sliding_window_size"] if attention.sliding_window_size not in (None, -1) else []
    return special + ([f"attn_type {attention.attn_type.value}"] if attention.attn_type.value != "decoder" else [])


def metadata_of_queries(backend: Any, queries: Queries) -> Any | None:
    """``forward_metadata`` of FA3's back end for ``queries`` instead of all rows of the pass; None if it holds more
    than what plain causal attention needs."""
    metadata = backend.forward_metadata
    if not is_plain_pass(backend):
        return None
    if metadata.cu_seqlens_q is None or len(metadata.cu_seqlens_q) != queries.requests + 1:
        return None
    return dataclasses.replace(metadata, cu_seqlens_q=queries.starts, max_seq_len_q=queries.longest)


def _class_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
