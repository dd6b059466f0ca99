"""A linear of the last layer: only of the rows that somebody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mixquant_sglang.layers.outputs import ReadRows
from mixquant_sglang.recipe.roles import Role

if TYPE_CHECKING:
    from mixquant_sglang.kernels.rows import Rows
    from mixquant_sglang.layers.packed import PackedLinearMethod


@dataclass(eq=False)
class ReadRowsProduct:
    """``hands_over``: as ``ReadRows``, not in their places of a whole matrix."""

    hands_over: bool = False

    def __call__(
        self,
        linear: PackedLinearMethod,
        layer: torch.nn.Module,
        x: torch.Tensor | ReadRows,
        read: Rows,
        rows: Rows | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor | ReadRows:
        """The rows ``read`` of the result, in their places of [T, N] or handed over; the others hold anything."""
        shape = x.shape[:-1]
        part = x.part if isinstance(x, ReadRows) else read.gather(x.reshape(-1, x.shape[-1]).contiguous())
        out = None
        if not self.hands_over:
            out = part.new_empty(shape.numel(), linear.shape[0])
        if read is rows:
            result = linear.protected(layer, part, rows, bias, out)
        else:
            result = linear.copy_in(linear.precision[Role.PROMPT]).matmul(part, bias)
            if rows is not None:
                protected = rows.slots[read.index] >= 0
                result = torch.where(protected[:, None], linear.protected(layer, part, read, bias), result)
            if out is not None and len(part):
                read.scatter(out, result)
        return ReadRows(result, shape.numel()) if out is None else out.view(*shape, out.shape[-1])
