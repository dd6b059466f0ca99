"""What differs between SGLang versions, and which of them is installed.

One file a version (``v0_5_17.py``, ``v0_5_23.py``), each with the names of ``Dialect``.  The file is picked by what the
installed SGLang has, never by its version string: the newest whose ``fits`` says so, else the oldest.  In versions
between two files some things are still those of the older one: what a file's functions rest on and ``fits`` does not
prove, they ask for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

from mixquant_sglang.versions import v0_5_17, v0_5_23


class Dialect(Protocol):
    """What a file of a version has; it imports sglang only when it is asked."""

    @property
    def HOOK_TARGETS(self) -> Mapping[str, str]:
        """Handler of a hook whose target not all versions have -> its target in this one.  A handler that is absent
        has nothing to hook in this version."""

    def fits(self) -> bool:
        """Whether the installed SGLang has what this file rests on and older versions lack."""

    def resolved(self, server_args: Any) -> Any:
        """``server_args`` with what SGLang made of them so far."""

    def resolution_finished(self, server_args: Any) -> bool:
        """Whether SGLang resolved these arguments before, in this process or in the one that sent them."""

    def prefill_graphs(self, model_runner: Any) -> Any:
        """SGLang's ``PhaseConfig`` of the prefill graphs: ``backend``, and the sizes ``bs`` to capture, in rows."""

    def forward_method(self, op: Any) -> Callable[..., Any]:
        """What a norm or activation of SGLang runs when it is called."""

    def tensor_parallel(self, layer: Any) -> tuple[int, int]:
        """(rank, ranks) by which SGLang slices the weight of a linear."""

    def stored_pages_are_named(self) -> bool:
        """Whether pages in stores that outlive the process are named by ``extra_key`` too."""

    def tree_ignores_keys(self) -> bool:
        """Whether the environment asks for a radix tree that looks at tokens alone."""

    def multiplexes(self) -> bool:
        """Whether SGLang's own PD multiplexing (``--enable-pdmux``) starts."""

    def replica(self, scheduler: Any) -> int | None:
        """Which replica of ``--dp-size`` the scheduler serves; None where there is one alone."""

    def set_first_chunk(self, req: Any, rows: int) -> None:
        """Makes the first ``rows`` tokens of a request what its next extend pass is of."""

    def autotune_logits(self) -> Mapping[str, bool]:
        """Arguments of ``flashinfer_autotune_context`` that say that a run of the model within it computes logits."""


VERSIONS: tuple[Dialect, ...] = (v0_5_23, v0_5_17)  # the newest first


@cache
def dialect() -> Dialect:
    """Of the installed SGLang."""
    return next((version for version in VERSIONS if version.fits()), VERSIONS[-1])


def hook_targets(handler: str) -> tuple[str, ...]:
    """The targets of the hook of ``handler`` in all versions, the newest first."""
    return tuple(dict.fromkeys(v.HOOK_TARGETS[handler] for v in VERSIONS if handler in v.HOOK_TARGETS))
