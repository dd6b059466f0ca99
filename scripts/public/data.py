"""Data of public benchmarks: a local file (JSON, JSONL, parquet) or a name on the hub; what is wrong is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from scripts.public.server import Stop

Row = dict[str, Any]


def _parse(file: Path) -> Any:
    if file.suffix == ".parquet":
        try:
            import pandas

            return json.loads(pandas.read_parquet(file).to_json(orient="records"))
        except ImportError:
            raise Stop(f"{file}: parquet needs pandas and pyarrow; install them, or give JSON") from None
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return json.loads(text)
    # At "\n" alone: JSON strings may hold other characters at which splitlines() ends a line, U+2028 among them.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_json(file: Path) -> Any:
    """The contents of a local file."""
    if not file.is_file():
        raise Stop(f"{file}: no such file")
    try:
        return _parse(file)
    except (ValueError, OSError) as error:
        raise Stop(f"{file}: cannot be read as {file.suffix[1:] or 'JSONL'} ({str(error).splitlines()[0]})") from None


def rows_of(file: Path, fields: tuple[str, ...]) -> list[Row]:
    """The examples of a local file, each with ``fields``."""
    found = read_json(file)
    rows = found.get("data") if isinstance(found, dict) else found
    return _checked(rows, fields, str(file))


def _checked(rows: Any, fields: tuple[str, ...], source: str) -> list[Row]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise Stop(f"{source}: not a list of examples")
    for place, row in enumerate(rows, 1):
        missing = [name for name in fields if row.get(name) is None]
        if missing:
            raise Stop(f"{source}: example {place} has no {missing[0]!r}; it has {', '.join(row)}")
    return rows


def from_hub(name: str, config: str | None, split: str, fields: tuple[str, ...]) -> list[Row]:
    """A split of a data set on the hub, through ``datasets``."""
    _quiet()
    try:
        import datasets
    except ImportError:
        raise Stop(
            f"{name} is on the hub, and `datasets` is not installed: pip install datasets, or give --data"
        ) from None
    datasets.disable_progress_bars()
    try:
        rows = list(datasets.load_dataset(name, config, split=split))
    except (OSError, ValueError, RuntimeError) as error:  # whatever network, hub and loader raise derives from these
        raise _unreachable(name, error) from None
    return _checked(rows, fields, name)


def file_from_hub(name: str, file: str) -> Path:
    """One file of a data set on the hub."""
    _quiet()
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise Stop(f"{name} is on the hub, and huggingface_hub is not installed: install it, or give --data") from None
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset"))
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(f"{name}/{file}", error) from None


def _unreachable(name: str, error: Exception) -> Stop:
    what = (str(error).strip().splitlines() or [""])[0][:200]
    return Stop(f"{name} cannot be had from the hub ({type(error).__name__}: {what}): give a local copy with --data")


def _quiet() -> None:
    """The hub's libraries retry in silence, unless the environment asks for more; what they give up on is said."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for library in ("HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
