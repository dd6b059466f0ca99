"""What a host adds to the GPU's times. Tags in the comments: as in ``rates.py``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """What comes beside the GPU's: once per prefill, for each of its prompt tokens, and in every decode step."""

    request_ms: float
    token_us: float
    step_ms: float


# [H200] client times less those of the passes, mean of four servers: 4.57, 5.09, 6.44, 8.35, 11.04 ms at 512, 2048,
# 8192, 16384, 32768 tokens. Decode is scheduled while the GPU runs, so a step has none.
# [assumed] Other hosts: the same.
SERVER = Host(request_ms=4.7, token_us=0.2, step_ms=0.0)
# [H200] sglang.bench_one_batch: no HTTP, but each step waits for the CPU: what its decode steps after 2k, 8k and 32k
# tokens take beyond the server's, 0.8 to 1.2 ms, mean over BF16 and FP8.
BENCH_ONE_BATCH = Host(request_ms=0.0, token_us=0.0, step_ms=1.1)
