"""The interface between a MoE layer and the low-precision experts that may run it.

A ``PackedExperts`` holds the low-precision copy of all experts that one rank has of one layer, as a ``PackedLinear``
holds that of one weight: it never owns or changes the BF16 masters, its tensors keep their addresses, and it is a plain
object.  Routing is SGLang's; what is computed here is, for token t with experts e and weights r,

    out[t] = scaling * sum_j r[t, j] * (act(x[t] @ gate[e_j].T, x[t] @ up[e_j].T) @ down[e_j].T)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.environment import NOTHING, Environment

ACTIVATIONS = ("silu", "gelu", "swiglu_oai")


@dataclass(frozen=True)
class Form:
    """What an expert does beside its products.

    ``activation``: ``silu``: silu(gate) * up; ``gelu``: gelu(gate) * up, by erf; ``swiglu_oai``: that of gpt-oss,
    ``g * sigmoid(alpha * g) * (u + 1)`` with g at most ``limit`` and u within it.  ``interleaved``: gate and up are the
    even and odd rows of w13, not its halves.  ``weighted_input``: a route's weight multiplies gate and up, not the
    result.  ``scaling`` multiplies the sum.
    """

    activation: str = "silu"
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    weighted_input: bool = False
    scaling: float = 1.0


class Masters(NamedTuple):
    """w13 bfloat16 [E, 2I, H], w2 bfloat16 [E, H, I] and their biases, float32 [E, 2I] and [E, H], or None."""

    w13: torch.Tensor
    w2: torch.Tensor
    bias13: torch.Tensor | None = None
    bias2: torch.Tensor | None = None


class Ready(NamedTuple):
    """One expert in NVFP4 already: the pieces of w13 (gate and up), and w2."""

    w13: list[NVFP4Tensor]
    w2: NVFP4Tensor


# expert (of this rank) -> its ready-made weights
ReadyExperts = Callable[[int], Ready]


class PackedExperts(ABC):
    """Low-precision copy of the experts; shapes and GPUs that it refuses: ``kernels/registry.py``."""

    precision: ClassVar[str]
    kernel: ClassVar[str]
    # Whether it can be made empty and filled a matrix at a time (``empty``, ``put``).
    piecewise: ClassVar[bool] = False
    # Whether it has ``place``.
    places: ClassVar[bool] = False

    @abstractmethod
    def __init__(
        self,
        masters: Masters,
        form: Form,
        *,
        scales: str = "search",
        ready: ReadyExperts | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        """Packs ``masters``, an expert at a time; ``scales`` as in the recipe.  ValueError for NaN or infinity.

        ``ready``: weights that are NVFP4 already, used instead; FP8 kernels raise ``ValueError`` for it."""

    @classmethod
    def refuses(cls, form: Form, biased: bool) -> str | None:
        """Why it does not run experts of ``form``, with biases or without, or None if it does."""
        return None

    @abstractmethod
    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """BF16 x [T, H], contiguous, T >= 0, float32 ``weights`` and int32 ``ids`` [T, k] (-1: an expert of another
        rank, which adds nothing) -> BF16 [T, H].  Row i depends on row i of each alone; x is not changed."""

    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The packed tensors, always in the same order, shapes and dtypes for the same shapes."""

    @abstractmethod
    def refresh(self, masters: Masters) -> None:
        """Packs the changed ``masters`` into the tensors that are there.  ValueError for NaN or infinity."""

    @classmethod
    def empty(cls, shapes: Masters, form: Form, *, scales: str, device: torch.device) -> PackedExperts:
        """For weights of these ``shapes``, which are not read; every matrix has to be ``put`` before it runs."""
        if not cls.piecewise:
            raise TypeError(f"{cls.__name__} packs all experts at once")
        made = object.__new__(cls)
        made.allocate(shapes, form, scales, device)
        return made

    def allocate(self, shapes: Masters, form: Form, scales: str, device: torch.device) -> None:
        """Where it is ``piecewise``: its tensors, on ``device``, unfilled."""
        raise TypeError(f"{type(self).__name__} packs all experts at once")

    def put(self, which: int, expert: int, weight: torch.Tensor) -> None:
        """Where it is ``piecewise``: packs w13 (``which`` 0, as the checkpoint orders its rows) or w2 (1) of one
        expert, BF16 [N, K], in place.  ValueError for NaN or infinity, before it writes."""
        raise TypeError(f"{type(self).__name__} packs all experts at once")

    def put_biases(self, bias13: torch.Tensor | None, bias2: torch.Tensor | None) -> None:
        """Where it is ``piecewise``: the biases of all experts."""
        raise TypeError(f"{type(self).__name__} packs all experts at once")

    def place(
        self, out: torch.Tensor, index: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> None:
        """The rows ``index`` int64 [R] (-1: unused slots, at its end; R <= ``limits.FEW_ROWS``) of x [T, H], as ``run``
        has them, into the same rows of ``out``.  CUDA only."""
        raise TypeError(f"{type(self).__name__} puts no rows in their places: call run")

    def replace(self, ready: ReadyExperts) -> None:
        """Copies ready-made experts, which only differ in values from those of ``__init__``, into the tensors."""
        raise ValueError(f"ready-made weights are NVFP4; this is {self.precision}")

    @property
    def nbytes(self) -> int:
        return sum({t.data_ptr(): t.nbytes for t in self.tensors()}.values())


def halves(w13: torch.Tensor, form: Form) -> torch.Tensor:
    """w13 [E, 2I, H] or its bias [E, 2I] with gate before up, however the checkpoint has them."""
    return torch.cat((w13[:, 0::2], w13[:, 1::2]), dim=1) if form.interleaved else w13


def require_finite(masters: Masters) -> None:
    """ValueError for NaN or infinity, before any of ``masters`` is packed over what is there."""
    for master in (masters.w13, masters.w2):
        if not all(bool(expert.isfinite().all()) for expert in master):
            raise ValueError("cannot quantise a weight that contains NaN or infinity: check the checkpoint")
