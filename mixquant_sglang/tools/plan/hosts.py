"""What a host adds to the GPU's times. Tags in the comments: as in ``rates.py``."""

from __future__ import annotations

from dataclasses import dataclass

from mixquant_sglang.tools.plan.rates import Curve


@dataclass(frozen=True)
class Host:
    """What comes beside the GPU's: once per prefill, for each of its prompt tokens, and in every decode step."""

    request_ms: float
    token_us: float
    step_ms: float


# Passes of a model with recurrent layers, milliseconds a layer, by rows: these layers break the captured graph, and the
# host, which launches what lies between, is what a short pass waits for. BF16, and low precision, which launches more.
# [H200] 12 layers of Qwen3.5-35B-A3B's dimensions, one host (2026-11-27): 15.38 and 20.05 ms of 512 and 2048 rows in
# BF16, 20.10 and 22.24 in fp8. What of the longer ones the GPU would take alone is not known, so that they are no floor
# but the whole pass; [assumed] further rows: as 2048, or what the GPU takes, where that is more. Other models and
# hosts: the same for each layer.
RECURRENT_MS: dict[bool, Curve] = {
    False: ((512, 15.38 / 12), (2048, 20.05 / 12)),
    True: ((512, 20.10 / 12), (2048, 22.24 / 12)),
}
WAITS = (
    "passes of some thousand tokens and fewer wait for the host, which launches what lies between recurrent layers; "
    "their times are not predicted but those of 12 layers of Qwen3.5-35B-A3B on an H200, for each layer "
    "(fp8 there: 0.77x of 512 tokens, 0.90x of 2048, 1.46x of 8192)"
)


# [H200] client times less those of the passes, mean over three runs on three hosts (2026-11-21, 22 and 27): 5.5, 6.1,
# 7.7 and 11.9 ms at 512, 2048, 8192 and 32768 tokens; from host to host by 1 ms either way. Decode is scheduled while
# the GPU runs, so a step has none.
# [assumed] Other hosts: the same.
SERVER = Host(request_ms=5.4, token_us=0.2, step_ms=0.0)
# [H200] sglang.bench_one_batch: no HTTP, but each step waits for the CPU: what its decode steps after 2k, 8k and 32k
# tokens take beyond the server's, 0.8 to 1.2 ms, mean over BF16 and FP8.
BENCH_ONE_BATCH = Host(request_ms=0.0, token_us=0.0, step_ms=1.1)
