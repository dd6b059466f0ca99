"""How SGLang loads the model of this process."""

from __future__ import annotations


def loads_dummy() -> bool:
    """Whether it fills weights with random numbers (``--load-format dummy``)."""
    from sglang.srt.runtime_context import get_server_args

    return str(get_server_args().load_format).rpartition(".")[2].lower() == "dummy"


def cache_dtype() -> str:
    """``--kv-cache-dtype``."""
    from sglang.srt.runtime_context import get_server_args

    return str(get_server_args().kv_cache_dtype or "auto")
