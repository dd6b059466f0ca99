"""What our hooks do inside SGLang, one short function per row of ``table.HOOKS`` and of ``patches/README.md``.

BEFORE handlers take the target's arguments, AFTER handlers its result first, AROUND handlers the target itself first.
"""

from mixquant_sglang.host.hooks import (
    architecture,
    arrival,
    bypasses,
    checker,
    forward,
    graphs,
    http,
    launcher,
    load,
    memory,
    observe,
    pairs,
    requests,
    table,
    weights,
)

__all__ = [
    "architecture",
    "arrival",
    "bypasses",
    "checker",
    "forward",
    "graphs",
    "http",
    "launcher",
    "load",
    "memory",
    "observe",
    "pairs",
    "requests",
    "table",
    "weights",
]
