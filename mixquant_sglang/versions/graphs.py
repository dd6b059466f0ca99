"""Sizes of the prefill CUDA graphs that SGLang captures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mixquant_sglang.versions.dialect import dialect


def prefill_graph_of(runner: Any, tokens: int) -> int:
    """Rows of the captured prefill graph that SGLang takes for ``tokens`` rows, at most as many as the largest has."""
    return int(runner._pad_to_bucket(tokens, runner.capture_num_tokens))


def add_prefill_graphs(model_runner: Any, rows: Iterable[int]) -> None:
    """Has SGLang capture breakable prefill graphs of ``rows`` rows too, of each number below its largest.

    Call it before ``capture_prefill_graph`` reads the list of sizes."""
    config = dialect().prefill_graphs(model_runner)
    if config.backend == "breakable" and config.bs:
        most = max(config.bs)
        config.bs = sorted({*config.bs, *(n for n in rows if 0 < n < most)})
