"""Which column of the recipe, prefill or decode, the running forward pass takes.

SGLang runs each forward pass synchronously on one thread per worker process (``forward_context.py`` says so), so a
module global that the hook on ``ModelRunner.forward`` sets and restores is enough, and unlike attributes of a
``ForwardBatch`` it survives the runners, which rebuild the batch.  Outside of any scope the decode column holds: decode
graph capture, autotuning and warm-up passes that bypass ``ModelRunner.forward`` need nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from mixquant_sglang.errors import MixQuantError

if TYPE_CHECKING:
    from mixquant_sglang.rows import Queries, Rows


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MASTER = "master"  # BF16 in every linear: packed copies are not those of their masters (refresh.py)


# sglang.srt.model_executor.forward_batch_info.ForwardMode, by name.  ``ForwardMode.is_extend()`` is no substitute: it
# is true for TARGET_VERIFY and DLLM_EXTEND.
_PHASE_OF_MODE = {
    "EXTEND": Phase.PREFILL,
    "MIXED": Phase.PREFILL,
    "SPLIT_PREFILL": Phase.PREFILL,
    "DECODE": Phase.DECODE,
    "IDLE": Phase.DECODE,
    "TARGET_VERIFY": Phase.DECODE,
    "DRAFT_EXTEND": Phase.DECODE,
    "DRAFT_EXTEND_V2": Phase.DECODE,
    "DLLM_EXTEND": Phase.DECODE,
}


def phase_of(mode: str) -> Phase:
    """Phase of a ``ForwardMode`` name; raises ``MixQuantError`` for a mode that this version does not know."""
    try:
        return _PHASE_OF_MODE[mode]
    except KeyError:
        raise MixQuantError(
            f"SGLang ran a forward pass in mode {mode}, which mixquant does not know; "
            f"known: {', '.join(_PHASE_OF_MODE)}. Refusing to guess its precision."
        ) from None


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: every row takes ``column`` of the recipe, save ``rows``, which take the decode column.

    Of the last layer's results only the rows ``read`` are looked at; None: all.  ``queries`` are these rows, if its
    attention is to compute them alone."""

    column: Phase
    rows: Rows | None = None
    read: Rows | None = None
    queries: Queries | None = None


DECODE_PASS = Pass(Phase.DECODE)
MASTER_PASS = Pass(Phase.MASTER)

_current = DECODE_PASS


def current() -> Pass:
    return _current


@contextmanager
def scope(running: Pass) -> Iterator[None]:
    """Publishes ``running`` as the current pass until the block ends."""
    global _current
    before, _current = _current, running
    try:
        yield
    finally:
        _current = before
