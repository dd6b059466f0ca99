"""The choice of FP8 GEMMs on disk: a file for each GPU, torch and kernel library, so that later starts only read it.

The file is under ``MIXQUANT_CACHE_DIR``, else under ``mixquant`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang.kernels.tuning import fp8_gemm
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell, GemmTable, Shape, Where, bucket
from mixquant_sglang.kernels.tuning.fp8_measure import first_line, measure, wanted

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1


def load_or_tune(
    shapes: Iterable[Shape], rows: Sequence[int], device: torch.device, versions: Mapping[str, str]
) -> GemmTable:
    """``fp8_measure.tune`` for what the file of this GPU, torch and ``versions`` (``{"sgl_kernel": "0.4.5"}``) lacks.

    Logs a line per shape.  A file that is broken or of another key is rebuilt, a folder that cannot be written is done
    without; either is one warning.  Ranks may race: the file is always whole, and what it has goes before one's own.
    """
    where_wanted = wanted(shapes, rows)
    key = _key(device, versions)
    path = _cache_file(key)
    cells, complaint = _read(path, key)
    if complaint:
        logger.warning("mixquant: %s: %s: rebuilt", path, complaint)
    fresh = measure([where for where in where_wanted if where not in cells], device)
    if fresh:
        cells |= fresh | _read(path, key)[0]
        try:
            _write(path.expanduser(), key, cells)
        except (OSError, RuntimeError) as error:
            logger.warning("mixquant: %s: cannot be written, so each start tunes anew: %s", path, error)
    table = GemmTable({where: cells[where] for where in where_wanted if where in cells})
    for n, k in dict.fromkeys(where[:2] for where in table.cells):
        cached = all(where[:2] != (n, k) for where in fresh)
        logger.info("mixquant: %s%s", table.describe(n, k), " (cached)" if cached else "")
    return table


def _key(device: torch.device, versions: Mapping[str, str]) -> dict[str, str]:
    gpu = {"gpu": "cpu"}
    if device.type == "cuda":
        sm = "".join(map(str, torch.cuda.get_device_capability(device)))
        gpu = {"gpu": torch.cuda.get_device_name(device), "sm": sm}
    return {**gpu, "torch": str(torch.__version__), **versions, "format": str(CACHE_FORMAT)}


def _cache_file(key: Mapping[str, str]) -> Path:
    named = os.environ.get("MIXQUANT_CACHE_DIR")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mixquant")
    return folder / ("fp8-gemm-" + re.sub(r"[^\w.+-]", "_", "-".join(key.values())) + ".json")


def _read(path: Path, key: Mapping[str, str]) -> tuple[dict[Where, Cell], str]:
    """The entries, and what is wrong with the file if they cannot be used."""
    try:
        return _parse(json.loads(path.expanduser().read_text(encoding="utf-8")), key), ""
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        return {}, f"{type(error).__name__}: {first_line(error)}"
    except (OSError, RuntimeError):  # there is none, or no home directory; if that is not all, writing will tell
        return {}, ""


def _parse(data: Any, key: Mapping[str, str]) -> dict[Where, Cell]:
    if data["key"] != key:
        raise ValueError(f"it belongs to {data['key']}")
    cells = {}
    for entry in data["entries"]:
        where, cell = (entry["n"], entry["k"], entry["rows"]), Cell(dict(entry["ms"]), dict(entry["out"]))
        if not (
            all(type(size) is int and size > 0 for size in where)
            and where[2] == bucket(where[2])
            and cell.ms
            and sorted([*cell.ms, *cell.out]) == sorted(fp8_gemm.CANDIDATES)
            and all(type(ms) is float and 0 < ms < float("inf") for ms in cell.ms.values())
            and all(type(why) is str for why in cell.out.values())
        ):
            raise ValueError(f"an entry that mixquant does not write, {entry}")
        cells[where] = cell
    return cells


def _write(path: Path, key: Mapping[str, str], cells: Mapping[Where, Cell]) -> None:
    entries = [{"n": n, "k": k, "rows": m, **asdict(cell)} for (n, k, m), cell in sorted(cells.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = Path(scratch, path.name)
        whole.write_text(json.dumps({"key": key, "entries": entries}, indent=1), encoding="utf-8")
        whole.replace(path)
