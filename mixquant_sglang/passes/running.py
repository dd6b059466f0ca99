"""The running forward pass: what its rows are there for.

SGLang runs each forward pass synchronously on one thread per worker process (``forward_context.py`` says so), so a
module global that the hook on ``ModelRunner.forward`` sets and restores is enough, and unlike attributes of a
``ForwardBatch`` it survives the runners, which rebuild the batch.  Outside of any scope rows are decode rows: decode
graph capture, autotuning and warm-up passes that bypass ``ModelRunner.forward`` need nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.roles import Role

if TYPE_CHECKING:
    from mixquant_sglang.kernels.rows import Rows
    from mixquant_sglang.passes.queries import Queries


# sglang.srt.model_executor.forward_batch_info.ForwardMode, by name.  ``ForwardMode.is_extend()`` is no substitute: it
# is true for TARGET_VERIFY and DLLM_EXTEND.
_ROLE_OF_MODE = {
    "EXTEND": Role.PROMPT,
    "MIXED": Role.PROMPT,
    "SPLIT_PREFILL": Role.PROMPT,
    "DECODE": Role.DECODE,
    "IDLE": Role.DECODE,
    "TARGET_VERIFY": Role.VERIFY,
    "DRAFT_EXTEND": Role.DRAFT,
    "DRAFT_EXTEND_V2": Role.DRAFT,
    "DLLM_EXTEND": Role.DECODE,
}


def role_of(mode: str) -> Role:
    """The role of a pass of the ``ForwardMode`` of that name, whose rows may have others (protected rows, decode rows
    of MIXED); raises ``MixQuantError`` for a mode that this version does not know."""
    try:
        return _ROLE_OF_MODE[mode]
    except KeyError:
        raise MixQuantError(
            f"SGLang ran a forward pass in mode {mode}, which mixquant does not know; "
            f"known: {', '.join(_ROLE_OF_MODE)}. Refusing to guess its precision."
        ) from None


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: every row has ``role``, save ``rows``, which are protected.

    Of the last layer's results only the rows ``read`` are looked at; None: all.  ``queries`` are these rows, if its
    attention is to compute them alone.  ``tokens``: how many rows there are, where some layers are given others, so
    that each linear of low precision has to look.  ``from_masters``: BF16 in every operator and for all rows, because
    packed copies are not those of their masters (``weights/refresh.py``)."""

    role: Role
    rows: Rows | None = None
    read: Rows | None = None
    queries: Queries | None = None
    tokens: int | None = None
    from_masters: bool = False


DECODE_PASS = Pass(Role.DECODE)
PROTECTED_PASS = Pass(Role.PROTECTED)  # a prefill pass all of whose rows are protected, or that is short
MASTER_PASS = Pass(Role.DECODE, from_masters=True)

_running: Pass | None = None


def current() -> Pass:
    return DECODE_PASS if _running is None else _running


@contextmanager
def scope(running: Pass) -> Iterator[None]:
    """Publishes ``running`` as the current pass until the block ends; raises ``RuntimeError`` within another scope."""
    global _running
    if _running is not None:
        raise RuntimeError(f"mixquant: a {running.role.value} pass began within a {_running.role.value} pass")
    _running = running
    try:
        yield
    finally:
        _running = None


def replace_current(running: Pass) -> None:
    """Publishes ``running`` in place of the running pass, until that ends."""
    global _running
    if _running is None:
        raise RuntimeError(f"mixquant: no pass runs that a {running.role.value} pass could take the place of")
    _running = running


@contextmanager
def within(part: Pass) -> Iterator[None]:
    """Publishes ``part``, some rows of the running pass by themselves, in its place until the block ends."""
    global _running
    whole, _running = _running, part
    try:
        yield
    finally:
        _running = whole
