"""Facts of the requests of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixquant_sglang.passes.rows import RequestRows


def request_rows(
    forward_batch: Any, batch: Any, wants_bf16: Callable[[Any], bool], prompt_tokens: Callable[[Any], int]
) -> list[RequestRows]:
    """The requests of an EXTEND, MIXED or SPLIT_PREFILL batch in row order."""
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    return [
        RequestRows(
            new=int(new),
            prefix=int(prefix),
            prompt=prompt_tokens(req),
            decoding=id(req) in decoding,
            bf16=wants_bf16(req),
        )
        for req, new, prefix in zip(
            batch.reqs, forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu, strict=True
        )
    ]


def reads_all_rows(forward_batch: Any) -> bool:
    """Whether SGLang looks at more of an extend batch's final hidden states than the last one of each request.

    ``LogitsProcessor._get_pruned_states`` takes that one alone unless input logprobs are asked for; hidden states that
    SGLang is to hand over are either of that one (LAST) or of all (FULL).
    """
    if forward_batch.capture_hidden_mode is not None and forward_batch.capture_hidden_mode.is_full():
        return True
    for name in ("is_prefill_only", "return_pooled_hidden_states", "multi_item_delimiter_indices"):
        if getattr(forward_batch, name, None):
            return True
    if not forward_batch.return_logprob:
        return False
    starts, sizes = forward_batch.extend_logprob_start_lens_cpu, forward_batch.extend_seq_lens_cpu
    return any(start < size - 1 for start, size in zip(starts, sizes, strict=True))
