"""Which variant of FlashInfer's FP4 GEMM runs a prefill shape: measured at start, before graphs are captured.

``mm_fp4`` has many tactics (tiles, clusters, order of tiles) and chooses by (N, K) and a bucket of M; for what was
never measured it takes a default.  SGLang has it measured at start for the quantizations that it knows, "mixquant" not
among them, and then in a decode pass, whose rows are few and which is BF16 here.

So each distinct linear runs here once for each power of two from 256 rows up to the largest prefill pass, in a context
in which FlashInfer measures.  FlashInfer itself adds the buckets in between, and those below 256.  What it measured
stays in SGLang's file, so that the next start only reads it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from mixquant_sglang.kernels.linear.base import PackedLinear
from mixquant_sglang.kernels.linear.native_nvfp4 import NativeNVFP4

logger = logging.getLogger(__name__)

SMALLEST = 256  # rows of the first run


@dataclass(frozen=True)
class Tuned:
    """How many distinct GEMMs were measured, up to how many rows, and how long it took."""

    shapes: int
    rows: int
    seconds: float

    def __str__(self) -> str:
        return f"FlashInfer chose FP4 GEMMs for {self.shapes} shapes and up to {self.rows} rows in {self.seconds:.1f} s"


def buckets(most_rows: int) -> list[int]:
    """Powers of two from 256 to the first that holds ``most_rows``."""
    return [2**e for e in range(8, max((most_rows - 1).bit_length(), 8) + 1)]


def tune(linears: Iterable[PackedLinear], most_rows: int, measuring: AbstractContextManager[None]) -> Tuned:
    """Runs one native linear for each set of GEMM shapes within ``measuring``, on the linear's device.

    Leaves torch's generators alone.  A linear for which memory is too short keeps what was measured till then, with a
    warning.
    """
    distinct: dict[tuple[tuple[int, int], ...], NativeNVFP4] = {}
    for linear in linears:
        if isinstance(linear, NativeNVFP4):
            distinct.setdefault(linear.gemm_shapes, linear)
    rows = buckets(most_rows)
    start = time.perf_counter()
    with torch.no_grad(), measuring:
        for shapes, linear in distinct.items():
            try:
                _run(linear, rows)
            except torch.OutOfMemoryError:
                logger.warning("mixquant: FP4 GEMM %s: too little memory to tune it with %d rows", shapes, rows[-1])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # SGLang sizes its KV cache next
    return Tuned(len({shape for shapes in distinct for shape in shapes}), rows[-1], time.perf_counter() - start)


def _run(linear: NativeNVFP4, rows: list[int]) -> None:
    device = linear.tensors()[0].device
    random = torch.Generator(device).manual_seed(0)
    for m in rows:
        linear.matmul(torch.randn(m, linear.k, dtype=torch.bfloat16, device=device, generator=random), None)
