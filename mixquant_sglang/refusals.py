"""What mixquant refuses of SGLang's flags, and how a refusal ends a process: one line that says why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mixquant_sglang.errors import MixQuantError


@contextmanager
def refusing() -> Iterator[None]:
    """Turns a ``MixQuantError`` into the end of this process with that one line on stderr."""
    try:
        yield
    except MixQuantError as error:
        sys.stdout.flush()
        raise SystemExit(f"mixquant: {error}") from None


# Field of ServerArgs, how much of it is refused, and why.  What is not here was seen working or does not touch us.
_REFUSED: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    (
        "tokenizer_worker_num",
        "--tokenizer-worker-num > 1",
        lambda v: v > 1,
        "SGLang does not load plugins in its tokenizer workers",
    ),
    (
        "enable_dp_attention",
        "--enable-dp-attention",
        bool,
        "it turns decode passes into prefill passes and mixes the rows of several ranks",
    ),
    ("attn_dp_size", "--attn-dp-size > 1", lambda v: v > 1, "it mixes the rows of several ranks"),
    ("dp_size", "--dp-size > 1", lambda v: v > 1, "it has not been tested; start one server per replica"),
    ("pp_size", "--pp-size > 1", lambda v: v > 1, "pipeline parallelism has not been tested"),
    ("attn_cp_size", "--attn-cp-size > 1", lambda v: v > 1, "context parallelism reorders token rows"),
    ("enable_prefill_cp", "--enable-prefill-cp", bool, "context parallelism reorders token rows"),
    ("enable_two_batch_overlap", "--enable-two-batch-overlap", bool, "it splits the rows of a pass"),
    ("enable_pdmux", "--enable-pdmux", bool, "it has not been tested"),
    ("speculative_algorithm", "--speculative-algorithm", bool, "speculative decoding has not been tested"),
    ("dllm_algorithm", "--dllm-algorithm", bool, "diffusion language models have no prefill to speak of"),
    (
        "disaggregation_mode",
        "--disaggregation-mode",
        lambda v: v not in (None, "null"),
        "one server does both phases here; prefill/decode disaggregation has not been tested",
    ),
    ("enable_lora", "--enable-lora", bool, "LoRA has not been tested"),
    ("lora_paths", "--lora-paths", bool, "LoRA has not been tested"),
    ("cpu_offload_gb", "--cpu-offload-gb", bool, "packed weights would stay on the GPU"),
    ("offload_group_size", "--offload-group-size", lambda v: v is not None and v > 0, "it has not been tested"),
    (
        "enable_deterministic_inference",
        "--enable-deterministic-inference",
        bool,
        "the low-precision GEMMs sum in an order that depends on the number of rows",
    ),
    (
        "moe_a2a_backend",
        "--moe-a2a-backend",
        lambda v: v != "none",
        "SGLang runs BF16 experts by other code there once a quantization is named",
    ),
    ("use_ray", "--use-ray", bool, "SGLang does not load plugins in Ray actors"),
    ("encoder_only", "--encoder-only", bool, "an encoder has no prefill"),
    (
        "cuda_graph_backend_prefill",
        "--cuda-graph-backend-prefill full or tc_piecewise",
        lambda v: v in ("full", "tc_piecewise"),
        "row protection is tested with breakable prefill graphs and without; use 'breakable' or 'disabled'",
    ),
)


def check_server_args(server_args: Any) -> None:
    """Raises ``MixQuantError`` for a flag that mixquant refuses."""
    for field, flag, refused, why in _REFUSED:
        value = getattr(server_args, field, None)
        if value is not None and refused(value):
            raise MixQuantError(f"--quantization mixquant does not go with {flag}: {why}")
