"""What mixquant refuses of PD multiplexing: prefill of a few layers at a time, beside decode on another stream.

Host code runs one pass after the other, so the running pass (``passes/running.py``) is always the one that is launched.
What two passes on the GPU at once would share are buffers that outlive a call: our own are prefill's alone.
"""

from __future__ import annotations

from typing import Any

from mixquant_sglang.host.refusal import Refusal, is_set, several
from mixquant_sglang.versions.dialect import dialect

_WITH = " with --enable-pdmux"
_BOUND = "use --chunked-prefill-size to bound what decode waits for"
_NOT_TESTED = "it has not been tested together with PD multiplexing"


def _broken(value: Any) -> bool:
    return is_set(value) and not dialect().multiplexes()


MULTIPLEXED: tuple[Refusal, ...] = (
    Refusal(
        "enable_pdmux",
        "--enable-pdmux",
        _broken,
        "this SGLang's own does not start: it asks the scheduler for a gpu_id that the scheduler no longer has",
        _BOUND + ", or SGLang 0.5.23",
    ),
    Refusal(
        "enable_pdmux",
        "--enable-pdmux and a recipe that decodes low",
        is_set,
        "low-precision GEMMs of prefill and of decode would run at once, and FlashInfer's share a workspace",
        "use a recipe that decodes in bf16",
        decodes_low=True,
    ),
    Refusal(
        "speculative_algorithm",
        "--speculative-algorithm" + _WITH,
        is_set,
        "its loop runs a prompt through the served model alone, not through a draft",
        "do not speculate",
        beside="enable_pdmux",
    ),
    Refusal(
        "enable_dp_attention",
        "--enable-dp-attention" + _WITH,
        is_set,
        _NOT_TESTED,
        "use --tp-size",
        beside="enable_pdmux",
    ),
    Refusal("attn_dp_size", "--attn-dp-size > 1" + _WITH, several, _NOT_TESTED, "use --tp-size", beside="enable_pdmux"),
)
