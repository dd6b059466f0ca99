"""From how many rows of a pass on low precision is faster than BF16: the choice behind ``min_tokens: auto``.

A pass that ends a prompt reads the packed weights for prompt rows and the BF16 ones for protected rows; in BF16 it
reads the latter alone. So some hundred rows are slower in low precision, and of experts, each of which is reached by
few rows, other numbers than of linears. What is timed are the products of the layers, by layers that are alike
(``layers/pass_times.py``); norms, activations and attention are taken to be the same either way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mixquant_sglang.kernels.tuning.cache_file import CacheFile, Cells, Sizes
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell
from mixquant_sglang.kernels.tuning.timing import milliseconds

logger = logging.getLogger(__name__)

BF16, LOW = "bf16", "low"
# Rows of the passes that are timed. GEMMs step with their tiles, and SGLang's prefill graphs are as near to each other.
ROWS = (16, *range(32, 513, 32), *range(576, 1025, 64), 1280, 1536, 2048, 3072, 4096)
SECONDS = 1.0  # for the repetitions of one kind of layer, all rows together; see timing.py
GAIN = 1.02  # that low precision must bring: less is noise, and BF16 is the better number

Call = Callable[[], object]
Totals = dict[int, tuple[float, float]]  # rows -> milliseconds of a pass: BF16, low


@dataclass(frozen=True)
class Alike:
    """Layers that take the same time: ``count`` of them, ``words`` for the log, and for a number of rows what runs
    ``each`` of them, whole in BF16 and as a pass with a protected row. ``sizes``: what the file knows them by."""

    words: str
    sizes: Sizes
    count: int
    each: int
    calls: Callable[[int], tuple[Call, Call]]


def file_of(kind: str, precision: str, fields: Sequence[str]) -> CacheFile:
    return CacheFile(f"pass-{kind}-{precision}", 2, (*fields, "form", "rows"), (BF16, LOW), buckets=False)


def load_or_time(
    file: CacheFile, layers: Sequence[Alike], rows: Sequence[int], device: torch.device, versions: Mapping[str, str]
) -> Totals | None:
    """Milliseconds of all ``layers`` together; a line for each that was timed. None, with a warning, where memory is
    too short."""
    by_sizes = {one.sizes: one for one in layers}
    wanted = [(*sizes, m) for sizes in sorted(by_sizes) for m in sorted(rows)]
    try:
        cells, _ = file.complete(wanted, partial(_measure, by_sizes, device), device, versions)
    except torch.OutOfMemoryError:
        logger.warning("mixquant: too little memory to time passes of up to %d rows", max(rows))
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    parts = []
    for (*sizes, m), cell in cells.items():
        count = by_sizes[tuple(sizes)].count
        parts.append({m: (count * cell.ms[BF16], count * cell.ms[LOW])})
    return add_up(parts)


def _measure(layers: Mapping[Sizes, Alike], device: torch.device, lacking: Sequence[Sizes]) -> Cells:
    cells: Cells = {}
    for place, (sizes, one) in enumerate(layers.items(), 1):
        rows = [where[-1] for where in lacking if where[:-1] == sizes]
        if rows:
            logger.info(
                "mixquant: timing passes in BF16 and in low precision, %d of %d: %s", place, len(layers), one.words
            )
            cells |= {(*sizes, m): cell for m, cell in _times(one, rows).items()}
    return cells


def _times(one: Alike, rows: Sequence[int]) -> dict[int, Cell]:
    """In CUDA graphs, as passes run: of few rows the host would be what is timed."""
    kept, graphs = [], []
    pool = torch.cuda.graph_pool_handle()
    for m in rows:
        pair = one.calls(m)
        kept.append(pair)  # what the graphs read
        for call in pair:
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                call()
            graphs.append(graph)
    ms = iter(milliseconds([graph.replay for graph in graphs], SECONDS))
    return {m: Cell({name: round(next(ms) / one.each, 6) for name in (BF16, LOW)}, {}) for m in rows}


def add_up(parts: Iterable[Totals]) -> Totals:
    """The passes that consist of ``parts``."""
    totals: Totals = {}
    for part in parts:
        for m, (bf16, low) in part.items():
            before = totals.get(m, (0.0, 0.0))
            totals[m] = before[0] + bf16, before[1] + low
    return dict(sorted(totals.items()))


def least_rows(totals: Totals) -> int:
    """From how many rows on passes are low: from the first size that gains, beyond all that lose, down to one more than
    the size before it, since a graph of that size is captured for what stays BF16."""
    before = 0
    loses = max((m for m, (bf16, low) in totals.items() if low > bf16), default=0)
    for m, (bf16, low) in totals.items():
        if m > loses and low * GAIN <= bf16:
            break
        before = m
    return before + 1


def describe(totals: Totals, least: int) -> str:
    """The sizes around ``least``, for the log."""
    below = [m for m in totals if m < least][-1:]
    beyond = [m for m in totals if m >= least][:1]
    times = ", ".join(f"{m} rows {totals[m][0]:.2f} ms in BF16 and {totals[m][1]:.2f} low" for m in (*below, *beyond))
    end = "" if beyond or not totals else f"; low precision is not faster at any size up to {max(totals)}"
    return f"passes of fewer than {least} new tokens stay BF16, which is faster (linears and experts: {times}{end})"
