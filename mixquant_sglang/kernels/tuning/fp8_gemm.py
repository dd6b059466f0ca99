"""Which GEMM runs a row-scaled FP8 linear: timed once at start, kept on disk, looked up by shape after that.

    y[m, n] = sx[m] * sw[n] * sum_k xq[m, k] wq[n, k] (+ bias[n])

``xq`` [M, K] and ``wq`` [N, K] are contiguous float8_e4m3fn, ``sx`` [M, 1] and ``sw`` [N] float32, ``bias`` [N] and
``y`` [M, N] BF16; M >= 1, N and K multiples of 16.  Neither candidate wins everywhere: on an H200, Qwen3-8B's o takes
0.188 ms at 8192 rows with ``cutlass`` and 0.206 with ``cublas``, its gate_up at 16384 rows 2.827 and 2.491.
``cublas`` is ``torch._scaled_mm``: cuBLASLt on SM90, torch's own CUTLASS kernels on SM89 and SM100
(aten/src/ATen/native/cuda/ScaledBlas.cpp).  A candidate that raises for a shape is out for it.

DeepGEMM is none of them: it wants scales by blocks (1x128, 128x128), so other packed weights, and was no faster up to
8192 rows (the four linears of a layer at 512 and 2048 rows: 0.221, 0.615 ms against 0.169, 0.587 with ``cutlass``; at
8192 each slower than the better of the two), 1 % faster at 16384 (4.72 against 4.78 with ``cublas``).

A row's value depends on that row alone; its rounding depends on the candidate and so on M, as it does within each
candidate.  The file keeps the choice, and with it the rounding, from start to start.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixquant_sglang.errors import MixQuantError

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
SMALLEST = 16  # rows of the first bucket
TIE = 1.02  # what a later candidate must beat an earlier one by, so that noise does not choose
SECONDS = 1.0  # for the repetitions of one tuning, all shapes together; at most twice that

Shape = tuple[int, int]  # N, K
Where = tuple[int, int, int]  # N, K, rows


def _cutlass(xq: Tensor, wq: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None) -> Tensor:
    import sgl_kernel

    out: Tensor = sgl_kernel.fp8_scaled_mm(xq, wq.t(), sx, sw[:, None], out_dtype=torch.bfloat16, bias=bias)
    return out


def _cublas(xq: Tensor, wq: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None) -> Tensor:
    scales = {"scale_a": sx, "scale_b": sw[None]}
    return torch._scaled_mm(xq, wq.t(), **scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


Gemm = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
CANDIDATES: dict[str, Gemm] = {"cutlass": _cutlass, "cublas": _cublas}  # the first serves where nothing was tuned
_REFUSALS = (RuntimeError, ValueError, TypeError, ImportError, AttributeError)  # an op that will not or is not there


@dataclass(frozen=True)
class Cell:
    """One (N, K, rows): milliseconds of each candidate, and why the others are out."""

    ms: Mapping[str, float]
    out: Mapping[str, str]

    @property
    def pick(self) -> str:
        """The first candidate that is within 2 % of the fastest."""
        return next(name for name in CANDIDATES if name in self.ms and self.ms[name] <= TIE * min(self.ms.values()))

    def __str__(self) -> str:
        others = ", ".join(f"{name} {ms:.3f}" for name, ms in self.ms.items() if name != self.pick)
        return f"{self.pick} {self.ms[self.pick]:.3f} ms" + (f" ({others})" if others else "")


def bucket(m: int) -> int:
    """The power of two, at least 16, whose timing stands for ``m`` rows."""
    return max(SMALLEST, 1 << (m - 1).bit_length())


class GemmTable:
    """What was timed, and the choice that follows from it."""

    def __init__(self, cells: Mapping[Where, Cell]) -> None:
        self.cells = dict(sorted(cells.items()))
        self._picks: dict[Shape, list[str]] = {}  # place e: up to 2**e rows
        for (n, k, m), cell in self.cells.items():  # rows ascend, so each fills the places that smaller ones left
            picks = self._picks.setdefault((n, k), [])
            picks += [cell.pick] * (m.bit_length() - len(picks))

    def pick(self, n: int, k: int, m: int) -> str:
        """The candidate for ``m`` >= 1 rows: that of the next tuned bucket, of the largest beyond it."""
        picks = self._picks.get((n, k))
        return picks[min((m - 1).bit_length(), len(picks) - 1)] if picks else next(iter(CANDIDATES))

    def describe(self, n: int, k: int) -> str:
        """One line: per row count the choice with its time and the other times, then who is out and why."""
        cells = {m: cell for (*shape, m), cell in self.cells.items() if shape == [n, k]}
        out = {f"; {name} is out: {why}": None for cell in cells.values() for name, why in cell.out.items()}
        return f"fp8 GEMM [{n}, {k}]: {', '.join(f'{m} rows {cell}' for m, cell in cells.items())}{''.join(out)}"

    def __str__(self) -> str:
        return "\n".join(self.describe(n, k) for n, k in self._picks)


_table = GemmTable({})


def use(table: GemmTable) -> None:
    """Lets ``scaled_mm`` of this process choose by ``table``; by ``GemmTable({})``, the first candidate always."""
    global _table
    _table = table


def scaled_mm(xq: Tensor, wq: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] BF16 (shapes and dtypes: this file's top); never synchronises, so graphs can capture it."""
    return CANDIDATES[_table.pick(wq.shape[0], wq.shape[1], xq.shape[0])](xq, wq, sx, sw, bias)


def tune(shapes: Iterable[Shape], rows: Sequence[int], device: torch.device) -> GemmTable:
    """Times the candidates for each (N, K) and row bucket on ``device``, the current one: about a second.

    Holds the operands and largest output of one shape and 256 MiB meanwhile; leaves torch's generators alone.  A shape
    for which memory is too short is left out, with a warning.  ``MixQuantError`` if no candidate can run a shape.
    """
    return GemmTable(_measure(_wanted(shapes, rows), device))


def _wanted(shapes: Iterable[Shape], rows: Sequence[int]) -> list[Where]:
    return [(n, k, m) for n, k in dict.fromkeys(shapes) for m in sorted({bucket(m) for m in rows})]


def _measure(wanted: Sequence[Where], device: torch.device) -> dict[Where, Cell]:
    shapes: dict[Shape, list[int]] = {}
    for n, k, m in wanted:
        shapes.setdefault((n, k), []).append(m)
    cells: dict[Where, Cell] = {}
    for (n, k), rows in shapes.items():
        try:
            cells.update(_measure_shape(n, k, rows, device, SECONDS / len(shapes)))
        except torch.OutOfMemoryError:
            logger.warning("mixquant: fp8 GEMM [%d, %d]: too little memory to tune it with %d rows", n, k, rows[-1])
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return cells


def _measure_shape(n: int, k: int, rows: list[int], device: torch.device, seconds: float) -> dict[Where, Cell]:
    seed = torch.Generator(device).manual_seed(0)
    x, w = _random(rows[-1], k, seed), _random(n, k, seed)
    sx, sw = (torch.full(size, 0.01, dtype=torch.float32, device=device) for size in ((rows[-1], 1), (n,)))
    bias = torch.ones(n, dtype=torch.bfloat16, device=device)
    out: dict[str, str] = {}
    for name, gemm in CANDIDATES.items():
        try:
            for m in rows:  # to warm up, and because passes come with odd numbers of rows too
                gemm(x[:m], w, sx[:m], sw, None)
                gemm(x[: m - 1], w, sx[: m - 1], sw, bias)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            out[name] = _first_line(error)
    left = [name for name in CANDIDATES if name not in out]
    if not left:
        raise MixQuantError(
            f"no FP8 GEMM runs a weight [{n}, {k}] here ({'; '.join(f'{name}: {why}' for name, why in out.items())}); "
            "use 'kernel: emulated', or keep such layers in BF16 with a rule of the recipe"
        )
    calls = [partial(CANDIDATES[name], x[:m], w, sx[:m], sw, None) for m in rows for name in left]
    ms = iter(_medians(calls, seconds))
    return {(n, k, m): Cell({name: round(next(ms), 6) for name in left}, out) for m in rows}


def _random(rows: int, columns: int, seed: torch.Generator) -> Tensor:
    """E4M3 [rows, columns] of Gaussian numbers: zeros would draw less power and so run faster than any real data."""
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=seed.device)
    for start in range(0, rows, 1024):  # so that the BF16 numbers take little memory
        part = data[start : start + 1024]
        numbers = torch.randn(part.shape, dtype=torch.bfloat16, device=seed.device, generator=seed)
        part.copy_(numbers.mul_(64).clamp_(-448, 448))
    return data


def _medians(calls: Sequence[Callable[[], Tensor]], seconds: float) -> list[float]:
    """Milliseconds of each call on the GPU, over up to 20 rounds through all of them, fewer when time is up."""
    # Written before each call.  It is more than twice any L2, so weights come from memory as they do between layers; it
    # takes tens of microseconds, in which the host gets ahead of the GPU.
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    event = partial(torch.cuda.Event, enable_timing=True)
    rounds: list[list[float]] = []
    begin = time.monotonic()
    while len(rounds) < 20 and time.monotonic() - begin <= seconds * (1 if len(rounds) >= 3 else 2):
        events = [(event(), event()) for _ in calls]
        for (start, stop), call in list(zip(events, calls, strict=True))[:: -1 if len(rounds) % 2 else 1]:
            flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        rounds.append([start.elapsed_time(stop) for start, stop in events])
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


# -- on disk -----------------------------------------------------------------------------------------------------------


def load_or_tune(
    shapes: Iterable[Shape], rows: Sequence[int], device: torch.device, versions: Mapping[str, str]
) -> GemmTable:
    """``tune`` for what the cache file of this GPU, torch and ``versions`` (``{"sgl_kernel": "0.4.5"}``) lacks.

    Logs a line per shape.  A file that is broken or of another key is rebuilt, a folder that cannot be written is done
    without; either is one warning.  Ranks may race: the file is always whole, and what it has goes before one's own.
    """
    wanted = _wanted(shapes, rows)
    key = _key(device, versions)
    path = _cache_file(key)
    cells, complaint = _read(path, key)
    if complaint:
        logger.warning("mixquant: %s: %s: rebuilt", path, complaint)
    fresh = _measure([where for where in wanted if where not in cells], device)
    if fresh:
        cells |= fresh | _read(path, key)[0]
        try:
            _write(path.expanduser(), key, cells)
        except (OSError, RuntimeError) as error:
            logger.warning("mixquant: %s: cannot be written, so each start tunes anew: %s", path, error)
    table = GemmTable({where: cells[where] for where in wanted if where in cells})
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
        return {}, f"{type(error).__name__}: {_first_line(error)}"
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
            and sorted([*cell.ms, *cell.out]) == sorted(CANDIDATES)
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
