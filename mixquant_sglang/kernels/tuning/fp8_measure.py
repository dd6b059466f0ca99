"""Times the candidates for a row-scaled FP8 linear (``fp8_gemm.py``) on the GPU that will serve."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.tuning import fp8_gemm
from mixquant_sglang.kernels.tuning.cache_file import first_line
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell, GemmTable, Shape, Where, bucket
from mixquant_sglang.kernels.tuning.timing import milliseconds

logger = logging.getLogger(__name__)

SECONDS = 1.0  # for the repetitions of one tuning, all shapes together; see timing.py
_REFUSALS = (RuntimeError, ValueError, TypeError, ImportError, AttributeError)  # an op that will not or is not there


def tune(shapes: Iterable[Shape], rows: Sequence[int], device: torch.device) -> GemmTable:
    """Times the candidates for each (N, K) and row bucket on ``device``, the current one: about a second.

    Holds the operands and largest output of one shape and 256 MiB meanwhile; leaves torch's generators alone.  A shape
    for which memory is too short is left out, with a warning.  ``MixQuantError`` if no candidate can run a shape.
    """
    return GemmTable(measure(wanted(shapes, rows), device))


def wanted(shapes: Iterable[Shape], rows: Sequence[int]) -> list[Where]:
    return [(n, k, m) for n, k in dict.fromkeys(shapes) for m in sorted({bucket(m) for m in rows})]


def measure(wanted: Sequence[Where], device: torch.device) -> dict[Where, Cell]:
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
    for name, gemm in fp8_gemm.CANDIDATES.items():
        try:
            for m in rows:  # to warm up, and because passes come with odd numbers of rows too
                gemm(x[:m], w, sx[:m], sw, None)
                gemm(x[: m - 1], w, sx[: m - 1], sw, bias)
            if device.type == "cuda":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except _REFUSALS as error:
            out[name] = first_line(error)
    left = [name for name in fp8_gemm.CANDIDATES if name not in out]
    if not left:
        raise MixQuantError(
            f"no FP8 GEMM runs a weight [{n}, {k}] here ({'; '.join(f'{name}: {why}' for name, why in out.items())}); "
            "use 'kernel: emulated', or keep such layers in BF16 with a rule of the recipe"
        )
    calls = [partial(fp8_gemm.CANDIDATES[name], x[:m], w, sx[:m], sw, None) for m in rows for name in left]
    ms = iter(milliseconds(calls, seconds))
    return {(n, k, m): Cell({name: round(next(ms), 6) for name in left}, out) for m in rows}


def _random(rows: int, columns: int, seed: torch.Generator) -> Tensor:
    """E4M3 [rows, columns] of Gaussian numbers: zeros would draw less power and so run faster than any real data."""
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=seed.device)
    for start in range(0, rows, 1024):  # so that the BF16 numbers take little memory
        part = data[start : start + 1024]
        numbers = torch.randn(part.shape, dtype=torch.bfloat16, device=seed.device, generator=seed)
        part.copy_(numbers.mul_(64).clamp_(-448, 448))
    return data
