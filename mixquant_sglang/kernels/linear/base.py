"""The interface between a linear layer and the low-precision GEMM that may run it.

A ``PackedLinear`` holds the low-precision copy of one BF16 weight and multiplies by it.  It never owns or changes the
BF16 master, its tensors keep their addresses when the weights are refreshed (captured graphs hold them), and it is a
plain object: registered as a module or buffer, the copy would be saved, hashed and restored with the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeAlias, TypeVar

import torch

from mixquant_sglang.formats.fp8 import FP8Tensor
from mixquant_sglang.formats.fp8_blocks import FP8Blocks
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.environment import NOTHING, Environment

# A weight that somebody else quantised, or some rows of it.
Piece: TypeAlias = NVFP4Tensor | FP8Tensor | FP8Blocks
_P = TypeVar("_P", NVFP4Tensor, FP8Tensor, FP8Blocks)
_NAMES = {NVFP4Tensor: "NVFP4", FP8Tensor: "FP8 with a scale for each row", FP8Blocks: "FP8 in blocks"}


class PackedLinear(ABC):
    """Low-precision copy of a weight [N, K] and ``x @ weight.T`` in that precision; shapes that it refuses:
    ``kernels/registry.py``."""

    precision: ClassVar[str]
    kernel: ClassVar[str]
    # The format that ``multiply`` takes (kernels/operands.py); None where the kernel quantises activations itself.
    activation_format: str | None = None

    # Whether it has ``place``.
    places: bool = False

    @abstractmethod
    def __init__(
        self,
        weight: torch.Tensor,
        *,
        scales: str = "search",
        ready: Sequence[Piece] | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        """Packs the BF16 ``weight`` [N, K]; ``scales`` as in the recipe.  Raises ``ValueError`` for NaN or Inf.

        ``ready``: the weight in this format already, rows in order, of NVFP4 a piece for each tensor scale; then it is
        used instead.  ``ValueError`` for another format.  ``environment``: what the server provides."""

    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The packed tensors, always in the same order, shapes and dtypes for one weight shape."""

    def multiply(self, operand: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
        """Quantised activations [M, K] of the format ``activation_format``, M >= 0, and BF16 [N] -> BF16 [M, N]."""
        raise TypeError(f"{type(self).__name__} quantises activations itself: call matmul")

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """BF16 [M, K] contiguous, M >= 0, and BF16 [N] -> BF16 [M, N].  Row i depends on ``x[i]`` alone."""
        assert self.activation_format is not None, "a kernel without an activation format has its own matmul"
        return self.multiply(operands.quantize(x, self.activation_format).operand, bias)

    def place(
        self,
        out: torch.Tensor,
        index: torch.Tensor,
        rows: torch.Tensor,
        bias: torch.Tensor | None,
        rest: torch.Tensor | None = None,
    ) -> None:
        """``rows`` BF16 [R, K], R <= ``limits.MANY_ROWS``, into the rows ``index`` of ``out``, as
        ``triton/few_rows.py`` says of ``linear_rows_``.  CUDA only."""
        raise TypeError(f"{type(self).__name__} puts no rows in their places: call matmul")

    def columns(self, start: int, stop: int) -> PackedLinear | None:
        """The linear of output columns ``start`` to ``stop`` alone, on the same memory; None if the kernel has none."""
        return None

    @abstractmethod
    def refresh(self, weight: torch.Tensor) -> None:
        """Packs the changed BF16 ``weight`` [N, K] into the tensors that are already there, whose values are not read:
        the numbers are those of packing it anew.  Raises ``ValueError`` for NaN or Inf, before it writes."""

    @property
    def by_value(self) -> tuple[float, ...]:
        """What captured graphs hold by value; when ``refresh`` changed it, they must not be replayed."""
        return ()

    def replace(self, ready: Sequence[Piece]) -> None:
        """Copies ready-made pieces, which only differ in values from those of ``__init__``, into the tensors."""
        raise ValueError(f"{type(self).__name__} takes no ready-made weights, and got {len(ready)} pieces")

    @property
    def nbytes(self) -> int:
        return sum({t.data_ptr(): t.nbytes for t in self.tensors()}.values())


def pieces(ready: Sequence[Piece], kind: type[_P], precision: str) -> list[_P]:
    """``ready``, all of one kind; ``ValueError`` if one is not."""
    found = [piece for piece in ready if isinstance(piece, kind)]
    if len(found) < len(ready):
        other = next(piece for piece in ready if not isinstance(piece, kind))
        raise ValueError(f"ready-made weights are {_NAMES[type(other)]}; this is {precision}")
    return found


def copy_all(targets: tuple[torch.Tensor, ...], sources: tuple[torch.Tensor, ...]) -> None:
    """Copies each source into the target that has its place, keeping the targets' addresses."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
