"""Experts of which no BF16 weights are kept: how they arrive, and what is left in their place.

``w13_weight`` and ``w2_weight`` have shapes and no memory; what SGLang loads into them is packed an expert at a time
(``weights/expert_staging.py``).  Biases stay as SGLang has them, and are copied with the packed weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.experts.base import Masters
from mixquant_sglang.weights.expert_staging import ExpertStaging

if TYPE_CHECKING:
    from mixquant_sglang.kernels.experts.base import PackedExperts

NAMES = ("w13_weight", "w2_weight")
_BIASES = tuple(f"{name}_bias" for name in NAMES)


class OneCopy:
    """Of one MoE layer, on ``device``.  ``arrived``: is called with 0 for w13 or 1 for w2, an expert and its BF16 [N,
    K] when that is whole, and hands it to ``put``."""

    def __init__(
        self, layer: torch.nn.Module, device: torch.device, arrived: Callable[[int, int, torch.Tensor], None]
    ) -> None:
        self.device = device
        self.arrived = arrived
        self._layer = layer
        self._copies: list[PackedExperts] = []
        self._missing: set[tuple[int, int]] = set()  # never packed
        self._failed: dict[tuple[int, int], str] = {}  # what came last of them is not packed, and why
        self._staged: list[ExpertStaging] = []

    def stage(self) -> None:
        """Puts parameters without memory in the place of the layer's weights, whatever these are."""
        self._staged = [self._stage(which, name) for which, name in enumerate(NAMES)]

    def _stage(self, which: int, name: str) -> ExpertStaging:
        old: torch.nn.Parameter = getattr(self._layer, name)

        def whole(expert: int, weight: torch.Tensor) -> None:
            self.arrived(which, expert, weight)

        known = {k: v for k, v in vars(old).items() if not k.startswith("_")}
        staging = ExpertStaging(old.shape, old.dtype, self.device, known, whole)
        self._layer.register_parameter(name, staging.parameter)
        return staging

    def keep_biases(self) -> None:
        """Gives those that SGLang made without memory some."""
        for name in _BIASES:
            old = getattr(self._layer, name, None)
            if old is not None and old.is_meta:
                new = torch.nn.Parameter(torch.empty_like(old, device=self.device), requires_grad=False)
                for attribute, value in vars(old).items():
                    setattr(new, attribute, value)
                self._layer.register_parameter(name, new)

    def fill(self, copies: list[PackedExperts], shapes: Masters) -> None:
        """``copies``, made ``empty``, are what arriving weights go into."""
        self._copies = copies
        self._missing = {(which, expert) for which in (0, 1) for expert in range(len(shapes[which]))}  # type: ignore[arg-type]

    def put(self, which: int, expert: int, weight: torch.Tensor) -> None:
        """Packs it.  Raises ValueError for NaN or infinity."""
        at = which, expert
        self._failed[at] = "what arrived last was not packed"
        try:
            for copy in self._copies:
                copy.put(which, expert, weight)
        except ValueError as error:
            self._failed[at] = str(error)
            raise
        del self._failed[at]
        self._missing.discard(at)

    def finish(self) -> None:
        """Once all that was to arrive has: takes the biases; MixQuantError if not every expert is packed."""
        for name, staging in zip(NAMES, self._staged, strict=False):
            if begun := staging.begun:
                raise MixQuantError(
                    f"only parts of {name} of expert {begun[0]} arrived, and no BF16 weight is kept to put them into"
                )
        for (which, expert), why in self._failed.items():
            raise MixQuantError(f"{NAMES[which]} of expert {expert}: {why}")
        for which, expert in sorted(self._missing):
            raise MixQuantError(f"{NAMES[which]} of expert {expert} did not arrive")
        biases = [getattr(self._layer, name, None) for name in _BIASES]
        for copy in self._copies:
            copy.put_biases(*(None if bias is None else bias.data for bias in biases))

    def forget(self) -> None:
        """Drops experts that are not whole."""
        for which, staging in enumerate(self._staged):
            for expert in staging.begun:
                self._failed[which, expert] = "only parts of its new weight arrived"
            staging.forget()
