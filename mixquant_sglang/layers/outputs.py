"""Results of linears and norms that are no plain matrix, though SGLang passes them on as if they were.

``SplitOutput``: SGLang's attention back ends call ``q.contiguous()`` on the first columns of the fused qkv result (8192
rows of Qwen3-8B on an H200: 90 us in each layer).  With a GEMM for q and one for k and v, q is contiguous from the
start.

``ReadRows``: behind the last layer's attention only the rows that are sampled from matter; the others do not exist.

Neither is a tensor: whatever reads one, other than the module that it was made for, gets an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch


def _refuse(function: Callable[..., Any], what: str) -> NoReturn:
    raise TypeError(
        f"{getattr(function, '__name__', function)} got {what}; report this model, and until then set "
        "'prefill: {fuse: false}' in the recipe"
    )


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
        _refuse(function, "a projection that mixquant keeps in two matrices")


@dataclass(frozen=True, eq=False, slots=True)
class ReadRows:
    """Stands for a matrix of ``tokens`` rows of which only those of ``Pass.read`` were computed: ``part`` BF16 [R, N].

    Where a captured graph has an unused slot, ``part`` may hold anything."""

    part: torch.Tensor
    tokens: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.tokens, self.part.shape[1]))

    @classmethod
    def __torch_function__(cls, function: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
        _refuse(function, "the last layer's rows that are sampled from, without the others")
