"""Where a checkpoint lies that a recipe names: a folder, or a snapshot of the hub."""

from __future__ import annotations

import functools
from pathlib import Path

from mixquant_sglang.errors import MixQuantError


@functools.cache
def find(asked: str, revision: str | None = None) -> Path:
    """The folder ``asked``, or that of the hub's snapshot of that name, downloaded unless it is there already."""
    if Path(asked).is_dir():
        return Path(asked)
    import httpx
    from huggingface_hub import snapshot_download

    try:
        patterns, ignored = ["*.safetensors", "*.json"], ["original/*", "consolidated*"]
        where = snapshot_download(asked, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
        return Path(where)
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise MixQuantError(f"{asked}: is no folder, and fetching it from the hub failed: {reason[:300]}") from None
