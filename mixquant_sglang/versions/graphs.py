"""Sizes of the prefill CUDA graphs that SGLang captures."""

from __future__ import annotations

from typing import Any

from mixquant_sglang.versions.dialect import dialect


def prefill_graph_of(runner: Any, tokens: int) -> int:
    """Rows of the captured prefill graph that SGLang takes for ``tokens`` rows, at most as many as the largest has."""
    return int(runner._pad_to_bucket(tokens, runner.capture_num_tokens))


def add_prefill_graph(model_runner: Any, rows: int) -> None:
    """Has SGLang capture a breakable prefill graph of ``rows`` rows too, if it is to capture larger ones.

    Call it before ``capture_prefill_graph`` reads the list of sizes."""
    config = dialect().prefill_graphs(model_runner)
    if config.backend == "breakable" and config.bs and 0 < rows < max(config.bs):
        config.bs = sorted({*config.bs, rows})
