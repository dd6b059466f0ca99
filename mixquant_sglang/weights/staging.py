"""A BF16 weight that is not kept: what arrives of it is gathered, and once all of it is there it is packed and dropped.

SGLang's loaders write part by part (q, k and v) into the parameter that they find by its name.  That parameter has a
shape and no memory, and whatever reads it gets an error (``Absent``); its ``weight_loader`` is ``Staging.load``, which
lends them a buffer.  A loader that writes past ``weight_loader`` writes nothing: the weight is
then incomplete, which ends a start and refuses an update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What may be asked of a weight that is not there.
_OF_SHAPE = frozenset(
    {"__get__", "__set__", "__len__", "__repr__", "dim", "element_size", "is_contiguous", "is_floating_point"}
    | {"ndimension", "nelement", "numel", "requires_grad_", "size", "stride", "detach"}
)

Loader = Callable[..., Any]
Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape and strides in a buffer


class Staging:
    """Of a weight [N, K], or of all experts [E, N, K]; ``whole`` is called with it, in BF16, when all of it has
    arrived, and must not keep it.

    ``attributes``: what loaders read of the parameter, with their ``weight_loader``."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        attributes: Mapping[str, Any],
        whole: Callable[[torch.Tensor], None],
    ) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._loader: Loader = attributes["weight_loader"]
        self._attributes = dict(attributes)
        self._whole = whole
        self._buffer: torch.nn.Parameter | None = None
        self._missing = 0
        self._there: set[Place] = set()  # what has arrived
        self._lock = threading.Lock()  # some loaders write the parts of one weight from several threads
        self.parameter = self._with_attributes(Absent(torch.empty(shape, dtype=dtype, device="meta"), False))
        self.parameter.weight_loader = self.load  # type: ignore[attr-defined]

    @property
    def begun(self) -> bool:
        """Whether some of it has arrived, and not all."""
        return self._buffer is not None

    def load(self, _parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As the loader that it stands for."""
        with self._lock:
            buffer = self._load(loaded, *args, **kwargs)
        if buffer is not None:
            self._whole(buffer)

    def _load(self, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The weight, once all of it is there."""
        if self._buffer is None:
            empty = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._buffer = self._with_attributes(torch.nn.Parameter(empty, requires_grad=False))
            self._missing = self._buffer.numel()
        with Written() as written:
            self._loader(self._buffer, loaded, *args, **kwargs)
        places = written.places.get(self._buffer.untyped_storage().data_ptr(), {})
        # A part that came before, once more: the last one counts, and the others are still to come.
        self._missing -= sum(numbers for place, numbers in places.items() if place not in self._there)
        self._there |= places.keys()
        if self._missing > 0:
            return None
        buffer = self._buffer.data
        self.forget()
        if self._missing < 0:
            raise RuntimeError(f"mixquant: {-self._missing} numbers more than a weight {list(self._shape)} has came")
        return buffer

    def forget(self) -> None:
        """Drops what has arrived."""
        self._buffer = None
        self._there = set()

    def _with_attributes(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        for name, value in self._attributes.items():
            setattr(parameter, name, value)
        return parameter


class Absent(torch.nn.Parameter):
    """Has shape, dtype and attributes, on torch's meta device.  Not a plain parameter of that device: torch's CPU
    kernels take one, and compute from whatever lies at address zero."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if name not in _OF_SHAPE:
            raise TypeError(
                f"{name} got a weight that is not kept in BF16, by the recipe; report this model, and until then keep "
                "its linears in BF16 with a rule of the recipe, or use a recipe that decodes in bf16"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*args, **(kwargs or {}))
        return args[0] if isinstance(found, torch.Tensor) and found.is_meta else found


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes where ``copy_`` writes while it is open: by the address of the memory, the places and how many numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: dict[int, dict[Place, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            target = args[0]
            places = self.places.setdefault(target.untyped_storage().data_ptr(), {})
            places[target.storage_offset(), tuple(target.shape), target.stride()] = target.numel()
        return function(*args, **(kwargs or {}))
