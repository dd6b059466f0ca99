"""Stores of keys and values that outlive the process."""

from __future__ import annotations

from typing import Any

from mixquant_sglang.versions.dialect import dialect

UNNAMED_PAGES = (
    "this SGLang names stored pages by their tokens alone, so KV of other recipes would be read; 0.5.23 does not"
)


def decode_server_keeps(server_args: Any) -> tuple[bool, bool]:
    """Of a decode server: whether keys and values go to a store that others read, and whether later requests reuse
    them at all."""
    args = dialect().resolved(server_args)
    shared = bool(args.disaggregation_decode_enable_offload_kvcache or args.hicache_storage_backend)
    return shared, shared or bool(args.disaggregation_decode_enable_radix_cache)


def refused_storage(message: str) -> Any:
    """What ``Scheduler.attach_hicache_storage_wrapped`` answers when it attached nothing."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

    return AttachHiCacheStorageReqOutput(success=False, message=message)
