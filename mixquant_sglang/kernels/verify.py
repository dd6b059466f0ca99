"""Whether the native NVFP4 kernel computes what the emulated one does, on this GPU and with this GEMM back end.

At load, on one layer for each GEMM shape [N, K], with its own weight and random activations of a few row counts (one of
them odd).  The activations lie on the NVFP4 grid already: every correct quantiser then returns the same codes, also one
that uses approximate reciprocals, so that nothing but the GEMM's arithmetic is left to differ.  The native kernel runs
as it will serve, with our quantiser or FlashInfer's (``linear/native_nvfp4.py``) and the GEMMs that were tuned.

Both kernels sum the same products, which are exact in FP32, apply alpha to the sum and round once to BF16.  Another
order of summation can push a result over a rounding boundary, so that it is one BF16 step (at most 2^-7 of it) apart;
with FP32 accumulators that is one result in 10^5.  ``TOLERANCE`` for |native - emulated| / |emulated| of a matrix
would take a quarter of them.  Scales in a wrong layout, swapped nibbles or a wrong alpha are far beyond it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels.linear.base import PackedLinear

TOLERANCE = 2.0**-8
ROWS = (16, 257, 1024)


@dataclass(frozen=True, eq=False)
class Pair:
    """Both kernels with the weight of the linear ``name``, [n, k]."""

    name: str
    n: int
    k: int
    native: PackedLinear
    emulated: PackedLinear


def verify(pairs: Iterable[Pair], device: torch.device) -> tuple[int, float]:
    """How many pairs were compared, and the worst relative error; ``MixQuantError`` if one exceeds ``TOLERANCE``."""
    count, worst = 0, 0.0
    for pair in pairs:
        for rows in ROWS:
            error = _relative_error(pair, activations(rows, pair.k).to(device))
            if not error <= TOLERANCE:  # NaN too
                raise MixQuantError(
                    f"native nvfp4 and the emulated kernel disagree on {pair.name}, [{pair.n}, {pair.k}] with {rows} "
                    f"rows: relative error {error:.3g}, allowed {TOLERANCE:.3g}; choose another --fp4-gemm-backend, "
                    "or 'kernel: emulated' in a recipe; 'verify: false' serves all the same"
                )
            worst = max(worst, error)
        count += 1
    return count, worst


def activations(rows: int, k: int) -> torch.Tensor:
    """Random BF16 [rows, k] that quantising to NVFP4 does not change; the same ones each time."""
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=random).bfloat16()
    return nvfp4.quantize_activations(x).dequantize()


def _relative_error(pair: Pair, x: torch.Tensor) -> float:
    expected = pair.emulated.matmul(x, None).float()
    return float((pair.native.matmul(x, None).float() - expected).norm() / expected.norm())
