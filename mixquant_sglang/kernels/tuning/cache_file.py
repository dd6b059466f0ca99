"""What was timed, on disk: a file for each GPU, torch and kernel library, so that later starts only read it.

The files are under ``MIXQUANT_CACHE_DIR``, else under ``mixquant`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang.kernels.tuning.fp8_gemm import Cell, bucket
from mixquant_sglang.kernels.tuning.timing import watch

logger = logging.getLogger(__name__)

Sizes = tuple[int, ...]
Cells = dict[Sizes, Cell]


@dataclass(frozen=True)
class CacheFile:
    """``fields``: the names of the sizes of an entry, rows last, and whether these are buckets (``fp8_gemm.bucket``);
    ``candidates``: all that a cell may speak of, and whether it must speak of all."""

    prefix: str
    format: int
    fields: Sequence[str]
    candidates: Sequence[str]
    whole: bool = True
    buckets: bool = True

    def complete(
        self,
        wanted: Sequence[Sizes],
        measure: Callable[[Sequence[Sizes]], Mapping[Sizes, Cell]],
        device: torch.device,
        versions: Mapping[str, str],
    ) -> tuple[Cells, set[Sizes]]:
        """The cells ``wanted``, of which ``measure`` gives those that the file lacks, and which these were.

        A file that is broken or of another key is rebuilt, a folder that cannot be written is done without, and times
        that others disturbed (``timing.py``) are not written; each is one warning.  Ranks may race: the file is always
        whole, and what it has goes before one's own."""
        key = self._key(device, versions)
        path = self._path(key)
        cells, complaint = self._read(path, key)
        if complaint:
            logger.warning("mixquant: %s: %s: rebuilt", path, complaint)
        with watch() as watched:
            fresh = measure([where for where in wanted if where not in cells])
        if fresh and watched.disturbed:
            logger.warning("mixquant: %s: not written, the next start times again", path)
            cells |= {**fresh, **self._read(path, key)[0]}
        elif fresh:
            cells |= {**fresh, **self._read(path, key)[0]}
            try:
                self._write(path.expanduser(), key, cells)
            except (OSError, RuntimeError) as error:
                logger.warning("mixquant: %s: cannot be written, so each start tunes anew: %s", path, error)
        return {where: cells[where] for where in wanted if where in cells}, {*fresh}

    def _key(self, device: torch.device, versions: Mapping[str, str]) -> dict[str, str]:
        gpu = {"gpu": "cpu"}
        if device.type == "cuda":
            sm = "".join(map(str, torch.cuda.get_device_capability(device)))
            gpu = {"gpu": torch.cuda.get_device_name(device), "sm": sm}
        return {**gpu, "torch": str(torch.__version__), **versions, "format": str(self.format)}

    def _path(self, key: Mapping[str, str]) -> Path:
        named = os.environ.get("MIXQUANT_CACHE_DIR")
        folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mixquant")
        return folder / (self.prefix + "-" + re.sub(r"[^\w.+-]", "_", "-".join(key.values())) + ".json")

    def _read(self, path: Path, key: Mapping[str, str]) -> tuple[Cells, str]:
        """The entries, and what is wrong with the file if they cannot be used."""
        try:
            return self._parse(json.loads(path.expanduser().read_text(encoding="utf-8")), key), ""
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            return {}, f"{type(error).__name__}: {first_line(error)}"
        except (OSError, RuntimeError):  # there is none, or no home directory; if that is not all, writing will tell
            return {}, ""

    def _parse(self, data: Any, key: Mapping[str, str]) -> Cells:
        if data["key"] != key:
            raise ValueError(f"it belongs to {data['key']}")
        cells: Cells = {}
        for entry in data["entries"]:
            where = tuple(entry[field] for field in self.fields)
            ms = dict(entry["ms"])
            order = [name for name in self.candidates if name in ms] + [
                name for name in ms if name not in self.candidates
            ]
            cell = Cell({name: ms[name] for name in order}, dict(entry["out"]))  # ties go to the first
            names = [*cell.ms, *cell.out]
            if not (
                all(type(size) is int and size > 0 for size in where)
                and (not self.buckets or where[-1] == bucket(where[-1]))
                and cell.ms
                and len({*names}) == len(names)
                and (sorted(names) == sorted(self.candidates) if self.whole else {*names} <= {*self.candidates})
                and all(type(ms) is float and 0 < ms < float("inf") for ms in cell.ms.values())
                and all(type(why) is str for why in cell.out.values())
            ):
                raise ValueError(f"an entry that mixquant does not write, {entry}")
            cells[where] = cell
        return cells

    def _write(self, path: Path, key: Mapping[str, str], cells: Cells) -> None:
        entries = [
            {**dict(zip(self.fields, where, strict=True)), **asdict(cell)} for where, cell in sorted(cells.items())
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch, path.name)
            whole.write_text(json.dumps({"key": key, "entries": entries}, indent=1), encoding="utf-8")
            whole.replace(path)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
