"""How SGLang loads a model: by ``server_args`` as they were given, or, without, by those of this process."""

from __future__ import annotations

from typing import Any


def loads_dummy(server_args: Any = None) -> bool:
    """Whether it fills weights with random numbers (``--load-format dummy``)."""
    return str(_args(server_args).load_format).rpartition(".")[2].lower() == "dummy"


def cache_dtype(server_args: Any = None) -> str:
    """``--kv-cache-dtype``."""
    return str(_args(server_args).kv_cache_dtype or "auto")


def embeds(server_args: Any = None) -> bool:
    """``--is-embedding``: no lm_head is read."""
    return bool(_args(server_args).is_embedding)


def _args(server_args: Any) -> Any:
    from sglang.srt.runtime_context import get_server_args

    return get_server_args() if server_args is None else server_args
