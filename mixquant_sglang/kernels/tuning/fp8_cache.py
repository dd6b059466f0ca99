"""The choice of FP8 GEMMs on disk (``cache_file.py``)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch

from mixquant_sglang.kernels.tuning.cache_file import CacheFile, Cells, Sizes
from mixquant_sglang.kernels.tuning.fp8_gemm import CANDIDATES, GemmTable, Shape
from mixquant_sglang.kernels.tuning.fp8_measure import measure, wanted

logger = logging.getLogger(__name__)

FILE = CacheFile("fp8-gemm", 2, ("n", "k", "rows"), tuple(CANDIDATES))


def load_or_tune(
    shapes: Iterable[Shape], rows: Sequence[int], device: torch.device, versions: Mapping[str, str]
) -> GemmTable:
    """``fp8_measure.tune`` for what the file of this GPU, torch and ``versions`` (``{"sgl_kernel": "0.4.5"}``) lacks.

    Logs a line per shape."""

    def timed(lacking: Sequence[Sizes]) -> Cells:
        return dict(measure([(n, k, m) for n, k, m in lacking], device).items())

    cells, fresh = FILE.complete(wanted(shapes, rows), timed, device, versions)
    table = GemmTable({(n, k, m): cell for (n, k, m), cell in cells.items()})
    for n, k in dict.fromkeys(where[:2] for where in table.cells):
        cached = all(where[:2] != (n, k) for where in fresh)
        logger.info("mixquant: %s%s", table.describe(n, k), " (cached)" if cached else "")
    return table
