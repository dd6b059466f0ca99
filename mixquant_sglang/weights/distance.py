"""How far ready-made codes are from the BF16 weight that they should be, by what rounding to NVFP4 does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mixquant_sglang.formats import BLOCK, nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor

# How far a part may be from the master, by what rounding to NVFP4 does.  Each code is to be the nearest with the scales
# that the checkpoint has; arithmetic in BF16 moves a boundary by up to ``TIE`` of a block's unit.  Measured on
# Gaussian, heavy-tailed (t3) and trained weights, with scales absmax, searched and weighted, and tensor scales 0.5 to
# 64 times the usual: up to 0.8% of the codes are others, the error is that of the nearest, 0.08 to 0.13 of the norm.
# A fine-tune 2% away has 6% other codes, one 10% away 27% and 1.4 times the error; a tensor scale 1.05 times too large
# 9%.  GPTQ, whose codes make up for each other's errors, has 29%: it cannot be told from a fine-tune, and is refused
# unless the recipe takes any rounding.  Then it may be ``FAR`` away, and what is asked is that it has the weight's
# scale as a whole and in all but some rows: GPTQ of a real model (llm-compressor, 90 linears) has 0.991 to 0.996 of
# it, rows spread by 0.4 to 1.3%; a fine-tune is not found.
TIE = 0.03
OTHER_CODES = 0.05
WORSE = 1.1
FAR = 0.25
SCALED = 0.03
SCALED_ROW = 0.1
SCALED_ROWS = 0.05


@dataclass(frozen=True)
class Distance:
    """``other`` of ``codes`` (those that are not zero on both sides) are not the nearest; squared errors of the codes
    that are there, ``far``, and of the nearest ones, and the squared ``norm`` of the weight.  ``along``: the product of
    the two, which over ``norm`` is the scale of one in the other; in ``scaled`` of ``rows`` that is not about 1."""

    other: int
    codes: int
    far: float
    nearest: float
    norm: float
    along: float
    scaled: int
    rows: int

    def __add__(self, other: Distance) -> Distance:
        """Of both parts together."""
        return Distance(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def others(self) -> float:
        """The share of the codes that are not the nearest."""
        return self.other / max(self.codes, 1)

    @property
    def errors(self) -> tuple[float, float]:
        """Of the codes and of the nearest, over the norm of the weight."""
        if not self.norm:
            return (math.inf if self.far else 0.0), 0.0
        return math.sqrt(self.far / self.norm), math.sqrt(self.nearest / self.norm)

    def problem(self, rounding: str) -> str | None:
        """Why the codes are not those of the weight, or None; ``rounding``: one of ``recipe.ROUNDINGS``."""
        close, (far, nearest) = self.far <= FAR**2 * self.norm, self.errors
        if rounding == "any":
            scale = self.along / self.norm if self.norm else 1.0
            scaled = self.scaled / max(self.rows, 1)
            if close and abs(scale - 1) <= SCALED and scaled <= SCALED_ROWS:
                return None
            return (
                f"it is {far:.2f} of the weight's norm away (allowed: {FAR}), {scale:.3f} of its size (allowed: 1 +- "
                f"{SCALED}), and {100 * scaled:.0f}% of its rows are scaled (allowed: {100 * SCALED_ROWS:.0f}%)"
            )
        if close and self.far <= WORSE**2 * self.nearest + 1e-12 * self.norm and self.others <= OTHER_CODES:
            return None
        return (
            f"{100 * self.others:.1f}% of its codes are not the nearest (allowed: {100 * OTHER_CODES:.0f}%), and it is "
            f"{far:.2f} of the weight's norm away (nearest codes: {nearest:.2f})"
        )


def distance(piece: NVFP4Tensor, master: torch.Tensor) -> Distance:
    """Of ``piece`` from ``master`` bfloat16 [n, K], of the same rows and columns."""
    far = nearest = norm = along = 0.0
    other = codes = scaled = 0
    for rows in (slice(start, start + 1024) for start in range(0, master.shape[0], 1024)):
        part = NVFP4Tensor(piece.packed[rows], piece.block_scales[rows], piece.tensor_scale)
        wanted, found = master[rows].float(), part.dequantize(torch.float32)
        unit = (part.block_scales.float() * part.tensor_scale).repeat_interleave(BLOCK, dim=1)
        error, least = (found - wanted).abs_(), (nvfp4.nearest(wanted, part) - wanted).abs_()
        other += int((error > least + TIE * unit).sum())
        codes += int(((wanted != 0) | (found != 0)).sum())
        products, squares = (found * wanted).sum(dim=1), wanted.square().sum(dim=1)
        along += float(products.sum(dtype=torch.float64))
        scaled += int(((products - squares).abs() > SCALED_ROW * squares).sum())
        far += float(error.square_().sum(dtype=torch.float64))
        nearest += float(least.square_().sum(dtype=torch.float64))
        norm += float(wanted.square_().sum(dtype=torch.float64))
    return Distance(other, codes, far, nearest, norm, along, scaled, master.shape[0])
