"""An update of the weights while SGLang carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class FromDisk:
    """An update from disk: the second reading, SGLang's rollback, is of ``before``."""

    before: str
    readings: int = 0


@dataclass
class Arriving:
    """``direct``: direct parameters while an update is being taken down, each with SGLang's function that loads them;
    ``sent_since_disk``: whether the weights are not those of any checkpoint on disk; ``session_failed``: why what a
    session wrote is not packed."""

    disk: FromDisk | None = None
    direct: list[tuple[Any, list[tuple[str, torch.Tensor]]]] | None = None
    sent_since_disk: bool = False
    session_failed: str | None = None
