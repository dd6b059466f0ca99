"""Stores of keys and values that outlive the process."""

from __future__ import annotations

from typing import Any

UNNAMED_PAGES = (
    "this SGLang names stored pages by their tokens alone, so KV of other recipes would be read; 0.5.23 does not"
)


def refused_storage(message: str) -> Any:
    """What ``Scheduler.attach_hicache_storage_wrapped`` answers when it attached nothing."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

    return AttachHiCacheStorageReqOutput(success=False, message=message)
