"""Which variant of FlashInfer's FP4 experts runs a prefill shape: measured at start, as FP4 GEMMs are
(``fp4_gemm.py``), with rows whose routes go to all experts alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from mixquant_sglang.kernels.experts.base import PackedExperts
from mixquant_sglang.kernels.tuning.fp4_gemm import buckets
from mixquant_sglang.kernels.verify_experts import routes

logger = logging.getLogger(__name__)

# experts, I, H, experts a token
Sizes = tuple[int, int, int, int]


def tune(layers: Mapping[Sizes, PackedExperts], most_rows: int, measuring: AbstractContextManager[None]) -> str:
    """Runs each once for each power of two from 256 rows up within ``measuring``; what was done, for the log.

    Leaves torch's generators alone.  Layers for which memory is too short keep what was measured till then, with a
    warning."""
    rows, start = buckets(most_rows), time.perf_counter()
    with torch.no_grad(), measuring:
        for sizes, packed in layers.items():
            try:
                _run(packed, sizes, rows)
            except torch.OutOfMemoryError:
                logger.warning("mixquant: FP4 experts %s: too little memory to tune them with %d rows", sizes, rows[-1])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # SGLang sizes its KV cache next
    seconds = time.perf_counter() - start
    return f"FlashInfer chose FP4 experts for {len(layers)} shapes and up to {rows[-1]} rows in {seconds:.1f} s"


def _run(packed: PackedExperts, sizes: Sizes, rows: list[int]) -> None:
    experts, _, h, k = sizes
    device = packed.tensors()[0].device
    random = torch.Generator(device).manual_seed(0)
    for m in rows:
        x = torch.randn(m, h, dtype=torch.bfloat16, device=device, generator=random)
        weights, ids = routes(m, experts, k)
        packed.run(x, weights.to(device), ids.to(device))
