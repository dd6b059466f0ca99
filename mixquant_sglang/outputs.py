"""The result of a qkv projection in two matrices, so that attention need not copy q out of rows that hold k and v too.

SGLang's attention back ends call ``q.contiguous()`` on the first columns of the fused result (8192 rows of Qwen3-8B on
an H200: 90 us in each layer).  With a GEMM for q and one for k and v, q is contiguous from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch


@dataclass(frozen=True, eq=False, slots=True)
class SplitOutput:
    """Stands for ``torch.cat([first, rest], dim=1)``; BF16 [M, A] and [M, N - A]."""

    first: torch.Tensor
    rest: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.first.shape[0], self.first.shape[1] + self.rest.shape[1]))

    def split(self, sizes: list[int], dim: int = -1) -> tuple[torch.Tensor, ...]:
        """As ``torch.Tensor.split`` along the last dimension, where one cut falls between the two."""
        if dim not in (-1, 1) or not sizes or sizes[0] != self.first.shape[1]:
            raise ValueError(f"split({sizes}, dim={dim}) of columns {self.first.shape[1]} + {self.rest.shape[1]}")
        return self.first, *torch.split(self.rest, sizes[1:], dim=-1)

    @classmethod
    def __torch_function__(cls, function: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{getattr(function, '__name__', function)} got a projection that mixquant keeps in two matrices; report "
            "this model, and until then set 'prefill: {fuse: false}' in the recipe"
        )
