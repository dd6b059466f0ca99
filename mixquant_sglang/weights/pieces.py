"""One module of a quantised checkpoint: which tensors make its weight, which slices a rank takes, and the weight.

A weight [N, K] is ``codes`` and ``scales``, and in NVFP4 a ``tensor_scale`` (``layouts.py``). The scales of FP8 are one
number, one for each row, or one for each block of 128 x 128 (``weight_scale_inv``, which is no inverse).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from mixquant_sglang.formats import BLOCK, TILE
from mixquant_sglang.formats.blocks import E2M1_MAX, E4M3_MAX
from mixquant_sglang.formats.fp8 import FP8Tensor
from mixquant_sglang.formats.fp8_blocks import FP8Blocks, blocks_of
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.linear.base import Piece
from mixquant_sglang.weights.layouts import Layout
from mixquant_sglang.weights.quantised_config import Family

Parts: TypeAlias = dict[str, torch.Tensor]  # by the last part of their names
# By the largest code, and in NVFP4 the largest block scale, a scale gives no more than BF16 holds.
_MOST = torch.finfo(torch.bfloat16).max
_MOST_FP8, _MOST_NVFP4 = _MOST / E4M3_MAX, _MOST / (E4M3_MAX * E2M1_MAX)
_LEAST = 2.0**-126


@dataclass(frozen=True)
class Kind:
    """``form``: nvfp4, tensor, row or blocks. ``shape``: [N, K]."""

    form: str
    shape: tuple[int, int]
    codes: str
    scales: str
    layout: Layout | None = None

    @classmethod
    def of(cls, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Kind | str:
        """Of a module with tensors of these ``shapes``, or what is wrong with it."""
        layout = family.layout
        codes = layout.codes if layout else "weight"
        scales = "weight_scale" if layout or "weight_scale_inv" not in shapes else "weight_scale_inv"
        for leaf in (codes, scales, *([layout.tensor_scale] if layout else [])):
            if leaf not in shapes:
                return f"{leaf} is missing"
        if len(shapes[codes]) != 2:
            return f"{codes} is {list(shapes[codes])}, which is no matrix"
        n, k = shapes[codes]
        found = shapes[scales]
        if layout:
            k *= 2
            kind = cls("nvfp4", (n, k), codes, scales, layout)
            if math.prod(shapes[layout.tensor_scale]) != 1:
                return f"{layout.tensor_scale} is {list(shapes[layout.tensor_scale])}, which is not one number"
            wanted = f"[{n}, {k // BLOCK}]"
            return kind if found == (n, k // BLOCK) and k % BLOCK == 0 else f"{scales} is {list(found)}, not {wanted}"
        blocks = (blocks_of(n), blocks_of(k))
        if family.blocks:
            wanted = f"{list(blocks)}, a number for each {TILE} x {TILE}"
            kind = cls("blocks", (n, k), codes, scales)
            return kind if found == blocks else f"{scales} is {list(found)}, not {wanted}"
        if math.prod(found) == 1:
            return cls("tensor", (n, k), codes, scales)
        if found in ((n,), (n, 1)):
            return cls("row", (n, k), codes, scales)
        return f"{scales} is {list(found)}: neither one number nor one for each of {n} rows"

    @cached_property
    def leaves(self) -> frozenset[str]:
        """The last parts of the names of the tensors that make the weight."""
        return frozenset({self.codes, self.scales, *([self.layout.tensor_scale] if self.layout else [])})

    @property
    def block_scales(self) -> str | None:
        """The E4M3 scales of NVFP4."""
        return self.scales if self.layout else None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Those that numbers have without which they mean something else."""
        if self.layout:
            return {self.codes: torch.uint8, self.scales: torch.float8_e4m3fn}
        return {self.codes: torch.float8_e4m3fn}

    def problem(self, name: str, leaf: str, tensor: torch.Tensor) -> str | None:
        """Why ``tensor`` cannot be that ``leaf``."""
        if leaf == self.block_scales:
            bad = bool((tensor.view(torch.uint8) > 0x7E).any())  # 0x7F is NaN, the rest have a sign
            return f"{name} holds negative or NaN block scales" if bad else None
        if leaf == self.codes:
            bad = self.layout is None and bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
            return f"{name} holds NaN" if bad else None
        if self.layout:
            value, scale = float(tensor.reshape(()).float()), float(tensor_scale(self.layout, tensor))
            if _LEAST <= scale <= _MOST_NVFP4:
                return None
            return f"{name} is {value:g}, which is no scale, or one by which weights are more than BF16 holds"
        low, high = map(float, torch.aminmax(tensor.float()))  # they propagate NaN
        if low >= 0 and high <= _MOST_FP8:
            return None
        if low >= 0 and math.isfinite(high):
            return f"{name} holds {high:g}, by which weights are more than BF16 holds"
        return f"{name} holds negative, NaN or infinite scales"

    def slices(self, leaf: str, tensor: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """Of the tensor ``leaf`` what belongs to these rows and columns of the weight; begins at whole blocks."""
        if leaf == self.codes:
            per = 2 if self.layout else 1
            return tensor[rows, columns.start // per : columns.stop // per]
        if leaf == self.block_scales:
            return tensor[rows, columns.start // BLOCK : columns.stop // BLOCK]
        if self.form == "blocks":
            return tensor[rows.start // TILE : blocks_of(rows.stop), columns.start // TILE : blocks_of(columns.stop)]
        return tensor.reshape(-1)[rows] if self.form == "row" else tensor.reshape(())


def piece(module: str, kind: Kind, parts: Parts) -> Piece:
    """The weight that ``parts`` make. ValueError for numbers that are none."""
    for leaf, tensor in parts.items():
        if problem := kind.problem(f"{module}.{leaf}", leaf, tensor):
            raise ValueError(problem)
    codes, scales = parts[kind.codes].contiguous(), parts[kind.scales].contiguous()
    if kind.layout:
        return NVFP4Tensor(codes, scales, tensor_scale(kind.layout, parts[kind.layout.tensor_scale]))
    if kind.form == "blocks":
        return FP8Blocks(codes, scales.float())
    return FP8Tensor(codes, scales.float().reshape(-1).expand(len(codes)).contiguous())


def tensor_scale(layout: Layout, stored: torch.Tensor) -> torch.Tensor:
    """That of a weight, float32 of no dimension, of what its checkpoint has."""
    outer = stored.reshape(()).float()
    return outer.reciprocal() if layout.encodes else outer
