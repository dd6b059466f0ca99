"""Which GEMM runs a row-scaled FP8 linear: the candidates, and the table that chooses by shape.

It is timed once at start (``fp8_measure.py``), kept on disk (``fp8_cache.py``) and looked up after that.

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
candidate.  The file keeps the choice, and with it the rounding, from start to start; there is none
of times that others disturbed (``timing.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 16  # rows of the first bucket
TIE = 1.02  # what a later candidate must beat an earlier one by, so that noise does not choose

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


@dataclass(frozen=True)
class Cell:
    """One (N, K, rows): milliseconds of each candidate, and why the others are out."""

    ms: Mapping[str, float]
    out: Mapping[str, str]

    @property
    def pick(self) -> str:
        """The first candidate that is within 2 % of the fastest."""
        return next(name for name, ms in self.ms.items() if ms <= TIE * min(self.ms.values()))

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

    def choices(self) -> dict[str, dict[str, list[int]]]:
        """By ``N x K``: each candidate's buckets of rows; empty where nothing was timed, and the first serves."""
        found: dict[str, dict[str, list[int]]] = {}
        for (n, k, m), cell in self.cells.items():
            found.setdefault(f"{n} x {k}", {}).setdefault(cell.pick, []).append(m)
        return found

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


def choices() -> dict[str, dict[str, list[int]]]:
    """``GemmTable.choices`` of this process; candidates add in other orders, so results differ in their last bits."""
    return _table.choices()


def scaled_mm(xq: Tensor, wq: Tensor, sx: Tensor, sw: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [M, N] BF16 (shapes and dtypes: this file's top); never synchronises, so graphs can capture it."""
    return CANDIDATES[_table.pick(wq.shape[0], wq.shape[1], xq.shape[0])](xq, wq, sx, sw, bias)
