"""Speculative decoding: which runner has the served model, and what its draft reads of it."""

from __future__ import annotations

from typing import Any

# Whose draft reads tokens, or the KV cache that it fills itself.  All others read hidden states of the served model:
# EAGLE and MTP those behind the last layer, of every row of a prompt; EAGLE3 those of earlier layers, by the same mode.
_READ_TOKENS = frozenset({"NONE", "NGRAM", "STANDALONE"})


def is_draft(model_runner: Any) -> bool:
    """Whether it runs a draft, which is SGLang's own: it has no layer of ours."""
    return bool(model_runner.is_draft_worker)


def algorithm(model_runner: Any) -> str | None:
    """What this server drafts with, as SGLang resolved it (NEXTN is EAGLE); None if it does not speculate."""
    name = str(model_runner.spec_algorithm.name)
    return None if name == "NONE" else name


def draft_reads_hidden_states(model_runner: Any) -> bool:
    """Whether the draft reads hidden states of all rows of a prompt."""
    return model_runner.spec_algorithm.name not in _READ_TOKENS
