"""Weights that change while the server runs."""

from __future__ import annotations

from typing import Any

from mixquant_sglang import runtime
from mixquant_sglang.hooks.table import handler


def _weights_changed() -> None:
    run = runtime.current()
    if run is not None:
        run.weights_changed()


@handler
def weights_from_tensor(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    _weights_changed()


@handler
def weights_from_distributed(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    _weights_changed()


@handler
def weights_resumed(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    _weights_changed()
