"""Whether the native NVFP4 experts compute what the emulated ones do, on this GPU.

At load, on one MoE layer for each shape, with its own weights, random activations of a few row counts and routes to all
experts.  The activations lie on the grid of both, with maxima that give both the same scale for a row: 448 * 6 times a
power of two.  What lies between gate, up and down does not: native experts scale its rows by their maximum, emulated
ones by a power of two, so codes differ where neither is more right.  Were their errors independent, two such results
would be 0.13 from each other; in float64 with Gaussian weights it is 0.07.  ``TOLERANCE`` takes 0.2.  A factor that is
wrong (a tensor scale, the scaling of routes) would hide in that, so the native result's projection on the emulated one
has to have its length, to 2^-6.  Halves or nibbles that were swapped, scales of other rows: errors near 1 and more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK, nvfp4
from mixquant_sglang.formats.blocks import E2M1_MAX, E4M3_MAX
from mixquant_sglang.kernels.experts.base import PackedExperts
from mixquant_sglang.kernels.verify import activations

TOLERANCE = 0.2
LENGTH = 2.0**-6
ROWS = (16, 257)


@dataclass(frozen=True, eq=False)
class ExpertsPair:
    """Both kernels with the experts ``name``: ``sizes`` experts, I, H, experts a token."""

    name: str
    sizes: tuple[int, int, int, int]
    native: PackedExperts
    emulated: PackedExperts


def verify_experts(pairs: Iterable[ExpertsPair], device: torch.device) -> tuple[int, float]:
    """How many pairs were compared, and the worst relative error; ``MixQuantError`` if one exceeds ``TOLERANCE``, or
    if its length is off by more than ``LENGTH``."""
    count, worst = 0, 0.0
    for pair in pairs:
        for rows in ROWS:
            error, length = _compared(pair, rows, device)
            if not (error <= TOLERANCE and abs(length - 1) <= LENGTH):  # NaN too
                experts, i, h, _ = pair.sizes
                raise MixQuantError(
                    f"native nvfp4 and the emulated kernel disagree on {pair.name}, {experts} experts of [{i}, {h}] "
                    f"with {rows} rows: relative error {error:.3g}, allowed {TOLERANCE:.3g}, length {length:.4g}, "
                    f"allowed 1 +- {LENGTH:.2g}; take a recipe rule '{{match: {pair.name}, prefill: bf16}}', or "
                    "'kernel: emulated'; 'verify: false' serves all the same"
                )
            worst = max(worst, error)
        count += 1
    return count, worst


def routes(rows: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 weights and int32 ids [rows, k], each row's ids all different; -1 where there are fewer experts."""
    random = torch.Generator().manual_seed(rows)
    weights = torch.rand(rows, k, generator=random).add_(0.1)
    place = torch.arange(k)
    ids = (torch.arange(rows)[:, None] * k + place) % experts
    return weights / weights.sum(-1, keepdim=True), ids.masked_fill_(place >= experts, -1).int()


def on_both_grids(rows: int, h: int) -> torch.Tensor:
    """BF16 [rows, h]: the largest value of each row is 448 * 6 times a power of two, alone in its block."""
    x = activations(rows, h)
    x[:, :BLOCK] = 0
    x[:, 0] = (nvfp4.row_scales(x) * (E4M3_MAX * E2M1_MAX)).to(x.dtype)
    return x


def _compared(pair: ExpertsPair, rows: int, device: torch.device) -> tuple[float, float]:
    """|native - emulated| / |emulated|, and the length of native's projection on emulated as a part of emulated's."""
    experts, _, h, k = pair.sizes
    x, (weights, ids) = on_both_grids(rows, h).to(device), routes(rows, experts, k)
    weights, ids = weights.to(device), ids.to(device)
    expected = pair.emulated.run(x, weights, ids).double()
    got = pair.native.run(x, weights, ids).double()
    square = expected.square().sum()
    return float((got - expected).norm() / square.sqrt()), float((got * expected).sum() / square)
