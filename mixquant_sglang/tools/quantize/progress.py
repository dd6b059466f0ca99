"""What an unfinished folder holds: a note in it, which goes after ``config.json``, the file that comes last and without
which nothing loads a folder.

Refused (MixQuantError): folders that hold something else, two runs at once, and going on with a folder that was begun
from another source or with other settings.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.quantize.writer import PARTIAL, publish
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.json_file import read_object

PROGRESS = ".mixquant-progress.json"
COLUMNS = ".mixquant-columns"  # safetensors: what calibration found of each linear's columns, until the end as well


@dataclass
class Progress:
    """What an unfinished ``out`` holds; kept in ``PROGRESS`` there until config.json is written."""

    out: Path
    settings: dict[str, Any]
    source: dict[str, list[Any]]
    finished: dict[str, int] = field(default_factory=dict)  # shard -> bytes
    input_amax: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, out: Path, settings: dict[str, Any], source: Source) -> Progress:
        """Begins in an empty folder, or goes on where the same run stopped."""
        note = cls(out, settings, source.fingerprint)
        if not (out / PROGRESS).exists():
            # an interruption before the first note leaves at most the note's temporary file
            if other := [path.name for path in out.iterdir() if path.name != PROGRESS + PARTIAL]:
                raise MixQuantError(
                    f"{out}: is not empty ({min(other)}) and holds no unfinished run; remove it, or name another OUT"
                )
            note.save()
            return note
        before = read_object(out / PROGRESS)
        for what, now in (("settings", note.settings), ("source", note.source)):
            then = before.get(what) or {}
            if changed := sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key)):
                key = changed[0]
                detail = (
                    f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" if what == "settings" else f"{key} changed"
                )
                raise MixQuantError(
                    f"{out}: holds an unfinished run with another {what} ({detail}); "
                    "repeat that run to finish it, or remove OUT to start again"
                )
        note.finished, note.input_amax = before["finished"], before["input_amax"]
        for shard, size in list(note.finished.items()):
            if not (out / shard).is_file() or (out / shard).stat().st_size != size:
                del note.finished[shard]
        return note

    def save(self) -> None:
        shown = {key: value for key, value in vars(self).items() if key != "out"}
        publish(self.out / PROGRESS, [_dump(shown)])

    def finish(self, shard: str) -> None:
        self.finished[shard] = (self.out / shard).stat().st_size
        self.save()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; the lock ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise MixQuantError(f"OUT {folder}: cannot be made a folder ({error.strerror}); name another") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MixQuantError(f"{folder}: another run is writing there; wait for it, or name another OUT") from None
        yield
    finally:
        os.close(handle)


def _dump(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
