"""JSON files of a checkpoint, whose every fault ends in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixquant_sglang.errors import MixQuantError

_NESTED = 64  # levels of a JSON file: fewer than what Python's own writer can do


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; MixQuantError where there is none."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(loaded, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except FileNotFoundError:
        raise MixQuantError(f"{path}: no such file; MODEL needs one") from None
    except OSError as error:
        raise MixQuantError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise MixQuantError(f"{path}: is not JSON: {one_line(error)}") from None
    except RecursionError:
        raise MixQuantError(f"{path}: is nested too deeply") from None
    if not isinstance(loaded, dict):
        raise MixQuantError(f"{path}: has to be a JSON object")
    if _nested_deeper(loaded, _NESTED):
        raise MixQuantError(f"{path}: is nested too deeply; allowed: {_NESTED} levels")
    return loaded


def object_of(where: str, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object that ``config`` has under ``key``; null counts as an empty one.  MixQuantError, which begins with
    ``where``, for any other shape."""
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise MixQuantError(f"{where}: {key} has to be a JSON object, not {_said(value)}")
    return value


def words_of(where: str, config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The same for a list of strings."""
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise MixQuantError(f"{where}: {key} has to be a list of strings, not {_said(value)}")
    return tuple(value)


def _said(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: Exception) -> str:
    """What ``error`` says, in one line of at most 120 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."


def _nested_deeper(value: object, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_nested_deeper(item, levels - 1) for item in items)
