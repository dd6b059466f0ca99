"""BF16 weights of experts that are not kept: what arrives of one is gathered, packed once it is whole, and dropped.

As ``staging.py`` has it for a linear, an expert at a time: SGLang's ``FusedMoE.weight_loader`` writes into
``param.data[expert]``, which is lent here, so that a layer of experts is never there in BF16 unless its checkpoint has
it in one tensor (``weight_loader_fused``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mixquant_sglang.weights.staging import Absent, Place, Staging, Written

_FUSED = "weight_loader_fused"  # SGLang's for tensors with all experts


class ExpertStaging:
    """Of weights [E, N, K]; ``whole`` is called with the number of an expert and its [N, K], in BF16, when all of that
    has arrived, and must not keep it.

    ``attributes``: what loaders read of the parameter, with their ``weight_loader``."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        attributes: Mapping[str, Any],
        whole: Callable[[int, torch.Tensor], None],
    ) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._loader: Callable[..., Any] = attributes["weight_loader"]
        self._whole = whole
        self._open: dict[int, _Begun] = {}
        self._together: Staging | None = None
        if getattr(self._loader, "__name__", "") == _FUSED:
            self._together = Staging(shape, dtype, device, attributes, self._split)
        self._lock = threading.Lock()  # some loaders write from several threads
        self.parameter = AbsentExperts(torch.empty(shape, dtype=dtype, device="meta"), False)
        for name, value in attributes.items():
            setattr(self.parameter, name, value)
        self.parameter.weight_loader = self.load  # type: ignore[attr-defined]

    @property
    def begun(self) -> list[int]:
        """The experts of which some has arrived, and not all."""
        together = self._together is not None and self._together.begun
        return [*range(self._shape[0])] if together else sorted(self._open)

    def load(self, _parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As the loader that it stands for."""
        if self._together is not None:
            self._together.load(self.parameter, loaded, *args, **kwargs)
            return
        with self._lock:
            lent: dict[int, _Begun] = {}
            self.parameter.lend = lambda expert: self._lend(expert, lent)
            try:
                with Written() as written:
                    self._loader(self.parameter, loaded, *args, **kwargs)
            finally:
                self.parameter.lend = None
            for expert, begun in lent.items():
                if begun.arrived(written.places.get(begun.address, {})):
                    del self._open[expert]
                    self._whole(expert, begun.buffer)

    def _lend(self, expert: int, lent: dict[int, _Begun]) -> torch.Tensor:
        expert = range(self._shape[0])[expert]
        if expert not in self._open:
            self._open[expert] = _Begun(torch.empty(self._shape[1:], dtype=self._dtype, device=self._device))
        lent[expert] = self._open[expert]
        return lent[expert].buffer

    def _split(self, weights: torch.Tensor) -> None:
        for expert, weight in enumerate(weights):
            self._whole(expert, weight)

    def forget(self) -> None:
        """Drops what has arrived."""
        self._open.clear()
        if self._together is not None:
            self._together.forget()


class _Begun:
    """An expert's weight, and which places of it were written."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.address = buffer.untyped_storage().data_ptr()
        self._there: dict[Place, int] = {}

    def arrived(self, places: Mapping[Place, int]) -> bool:
        """Counts what was written to ``places``; whether that is all.  RuntimeError if it is more."""
        self._there.update(places)
        more = sum(self._there.values()) - self.buffer.numel()
        if more > 0:
            raise RuntimeError(f"mixquant: {more} numbers more than an expert {list(self.buffer.shape)} has came")
        return more == 0


class AbsentExperts(Absent):
    """``Absent``, but for an expert of it that a loader is about to write."""

    lend: Callable[[int], torch.Tensor] | None = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "__getitem__" and isinstance(args[1], int):
            lend = args[0].lend
            if lend is not None:
                return lend(args[1])
        return super().__torch_function__(function, types, args, kwargs)
