"""Times the tiles of FP8 experts on the GPU that will serve, and keeps the choice on disk (``cache_file.py``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.tuning.cache_file import CacheFile, Cells, Sizes, first_line
from mixquant_sglang.kernels.tuning.expert_tiles import CANDIDATES, Shape, TileTable, likely
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell, bucket
from mixquant_sglang.kernels.tuning.timing import milliseconds

logger = logging.getLogger(__name__)

FILE = CacheFile("fp8-experts", 2, ("experts", "i", "h", "top_k", "rows"), tuple(CANDIDATES), whole=False)
SECONDS = 2.0  # for the repetitions of one shape, all rows together; see timing.py


def load_or_tune(
    shapes: Mapping[Shape, Any], rows: Sequence[int], device: torch.device, versions: Mapping[str, str]
) -> TileTable:
    """The tiles for ``rows`` of each shape; ``shapes``: packed experts of that shape, which are run.

    Logs a line per shape.  Tiles that a GPU cannot run are out; rows that no tiles run, and a shape for which memory is
    too short, are left out with a warning.  MixQuantError where no tiles run any of the rows."""
    wanted: list[Sizes] = [(*shape, m) for shape in sorted(shapes) for m in sorted({bucket(m) for m in rows})]
    cells, fresh = FILE.complete(wanted, partial(_measure, shapes, device), device, versions)
    table = TileTable(cells)  # type: ignore[arg-type]
    for shape in sorted(shapes):
        cached = all(where[:-1] != shape for where in fresh)
        logger.info("mixquant: %s%s", table.describe(shape), " (cached)" if cached else "")
    return table


def _measure(shapes: Mapping[Shape, Any], device: torch.device, lacking: Sequence[Sizes]) -> Cells:
    cells: Cells = {}
    for shape, experts in shapes.items():
        rows = [where[-1] for where in lacking if where[:-1] == shape]
        try:
            cells.update(_measure_shape(shape, experts, rows, device))
        except torch.OutOfMemoryError:
            logger.warning("mixquant: fp8 experts %s: too little memory to tune them with %d rows", shape, rows[-1])
    torch.cuda.empty_cache()
    return cells


def _measure_shape(shape: Shape, experts: Any, rows: Sequence[int], device: torch.device) -> Cells:
    count, _, h, k = shape
    seed = torch.Generator(device).manual_seed(0)
    calls: dict[tuple[int, str], Any] = {}
    out: dict[int, dict[str, str]] = {m: {} for m in rows}
    kept: list[Any] = []  # what the graphs read
    for m in rows:
        x = torch.randn(m, h, dtype=torch.bfloat16, device=device, generator=seed)
        scores, ids = routed(m, count, k, device, seed)
        for name in likely(shape, m):
            call = partial(experts.run_with, x, scores, ids, CANDIDATES[name])
            try:
                replay = _captured(call)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # Triton's too: more shared memory than there is
                out[m][name] = first_line(error)
                continue
            kept.append(call)
            calls[m, name] = replay
    for m in rows:
        if not any(rows_ == m for rows_, _ in calls):
            why = f"no tiles run {m} rows of FP8 experts {list(shape)} here ({_reasons(out[m])})"
            if not calls:
                raise MixQuantError(f"{why}; use 'kernel: emulated', or keep experts in BF16 with a rule of the recipe")
            logger.warning("mixquant: %s; they take those of more rows, or of the most that were timed", why)
    times = dict(zip(calls, milliseconds([*calls.values()], SECONDS), strict=True))
    found = {m: {name: round(ms, 6) for (rows_, name), ms in times.items() if rows_ == m} for m in rows}
    return {(*shape, m): Cell(found[m], out[m]) for m in rows if found[m]}


def _reasons(out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in out.items())


def _captured(call: Callable[[], object]) -> Callable[[], None]:
    """A run is ten kernels, and of few rows the host would be what is timed."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], None] = graph.replay
    return replay


def routed(
    rows: int, experts: int, k: int, device: torch.device, seed: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random routes: float32 weights and int32 ids [rows, k]; -1 where a rank has fewer experts than a token takes."""
    held = min(k, experts)
    scores, ids = torch.rand(rows, experts, device=device, generator=seed).topk(held)
    return F.pad(scores, (0, k - held)), F.pad(ids.int(), (0, k - held), value=-1)
