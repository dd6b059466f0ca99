"""A GEMM for the first columns of a fused projection and one for the rest, so that q is contiguous from the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.layers.outputs import SplitOutput
from mixquant_sglang.recipe.roles import Role

if TYPE_CHECKING:
    from mixquant_sglang.kernels.linear.base import PackedLinear
    from mixquant_sglang.kernels.rows import Rows
    from mixquant_sglang.layers.packed import PackedLinearMethod

_COLUMNS = 64  # of which the first must be a multiple: the widest tile of ``few_rows.py`` ends there


@dataclass(eq=False)
class SplitProduct:
    """Of the ``columns`` first columns and of the rest.  ``reads_only``: of the first, the rows ``Pass.read`` alone (in
    the last layer)."""

    columns: int
    first: PackedLinear
    rest: PackedLinear
    reads_only: bool = False

    @classmethod
    def of(cls, packed: PackedLinear, columns: int, n: int) -> SplitProduct | None:
        """None if the kernel of ``packed`` [n, K] has no such parts."""
        if columns % _COLUMNS:
            return None
        first, rest = packed.columns(0, columns), packed.columns(columns, n)
        return None if first is None or rest is None else cls(columns, first, rest)

    def __call__(
        self,
        linear: PackedLinearMethod,
        layer: torch.nn.Module,
        x: QuantizedActivations,
        rows: Rows | None,
        read: Rows | None,
        bias: torch.Tensor | None,
    ) -> SplitOutput:
        cut = self.columns
        first_bias, rest_bias = (None, None) if bias is None else (bias[:cut], bias[cut:])
        if self.reads_only and read is not None:
            first = self._first_of(linear, x, read, rows, first_bias)
        else:
            first = self.first.multiply(x.operand, first_bias)
        rest = self.rest.multiply(x.operand, rest_bias)
        if rows is not None:
            assert x.kept is not None
            if linear.takes_few(x.kept, rows):
                linear.place_few(first, rows.index, x.kept, bias, rest)
            else:
                whole = linear.product(Role.PROTECTED, layer, x.kept, bias)
                rows.scatter(first, whole[:, :cut].contiguous())
                rows.scatter(rest, whole[:, cut:].contiguous())
        return SplitOutput(first, rest)

    def _first_of(
        self,
        linear: PackedLinearMethod,
        x: QuantizedActivations,
        read: Rows,
        rows: Rows | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The first columns in the rows ``read``, save protected ones, and zeros elsewhere."""
        device = x.operand[0].device
        first = torch.zeros(x.shape[0], self.columns, dtype=torch.bfloat16, device=device)
        if read is not rows and len(read.index):
            read.scatter(first, self.first.multiply(operands.gather(x, read), bias))
        return first
