"""What an update may bring, looked at before any of it is written: tensors of the names and shapes of the checkpoint
that was loaded at start, of numbers that BF16 holds.

Without it a bad tensor is found half way: SGLang's loaders copy tensor by tensor, and what they overwrote is gone.
Refused: a name that neither that checkpoint nor the model has, another shape, a dtype that is not plain floating point
where it was before (an FP8 checkpoint cast to BF16 without its scales is another model), and NaN or infinity, also by
the rounding to BF16.  Where the loader at start read no checkpoint (``--load-format dummy``, ``remote_instance``),
names and shapes are known only of parameters that SGLang holds as the checkpoint does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mixquant_sglang.recipe.modules import block_of, is_draft

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CHUNK = 2**24  # elements in flight to the device
# Tensors that SGLang's loaders skip. Trainers leave them out, and so they do draft layers, which no served model has.
SKIPPED = re.compile(r"(?:.*\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")


class Quantised(Protocol):
    """A quantised checkpoint (``quantised.py``)."""

    def unused(self, name: str) -> bool: ...

    def problem(self, name: str, tensor: torch.Tensor) -> str | None: ...

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> str | None: ...


@dataclass
class Known:
    """Tensors of the checkpoint by name: shape and dtype."""

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)  # whole shapes, of one rank alone
    same: dict[str, set[str]] = field(default_factory=dict)  # name -> other names of its parameter
    wholes: dict[str, frozenset[str]] = field(default_factory=dict)  # linear -> tensors that must come together
    quantised: Quantised | None = None  # where the checkpoint is
    blocks: float = math.inf  # of the served model; a checkpoint may have draft blocks after them

    def record(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes ``weights`` on, and remembers names, shapes and dtypes."""
        for name, tensor in weights:
            self.tensors[name] = tuple(tensor.shape), tensor.dtype
            yield name, tensor

    def add_parameters(self, model: torch.nn.Module, *, ranks: int) -> None:
        """Trainers may send what the checkpoint leaves out (a tied head), and names as SGLang has them, save those of
        merged linears (qkv_proj) and experts, which its loaders fill by their parts alone."""
        config = getattr(model, "config", None)
        self.blocks = getattr(getattr(config, "text_config", config), "num_hidden_layers", None) or math.inf
        merged = {
            f"{name}.{leaf}"
            for name, module in model.named_modules()
            if hasattr(module, "output_sizes") or hasattr(module, "w13_weight")  # FusedMoE's experts
            for leaf, _ in module.named_parameters(recurse=False)
        }
        ids = {id(p): self.tensors[name][0] for name, p in model.named_parameters() if name in self.tensors}
        names: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), set()).add(name)
            if id(parameter) in ids:
                self.parameters[name] = ids[id(parameter)]
            elif ranks == 1 and name not in merged:
                self.parameters[name] = tuple(parameter.shape)
        self.same = {name: group - {name} for group in names.values() if len(group) > 1 for name in group}

    def missing(self, names: set[str]) -> str | None:
        """Why an update of the whole model by ``names`` is refused, or None."""
        gone = sorted(name for name in self.tensors.keys() - names if not self._spare(name, names))
        if gone:
            return f"{gone[0]} is missing" + (f", and {len(gone) - 1} more" if len(gone) > 1 else "")
        return None

    def _spare(self, name: str, names: set[str]) -> bool:
        block = block_of(name)
        return (
            bool(SKIPPED.fullmatch(name) or is_draft(name))
            or self._unused(name)
            or (block is not None and block >= self.blocks)
            or not names.isdisjoint(self.same.get(name, ()))
        )

    def _unused(self, name: str) -> bool:
        """Whether nothing of a quantised checkpoint takes it, whatever it holds."""
        return self.quantised is not None and self.quantised.unused(name)

    def torn(self, names: set[str]) -> str | None:
        """Why an update by ``names`` is refused: of a weight that is not kept in BF16, all parts are needed."""
        for linear, parts in self.wholes.items():
            came = sorted(parts & names)
            if came and len(came) < len(parts):
                lacking = ", ".join(sorted(parts - names))
                return (
                    f"{came[0]} came without {lacking}: this recipe keeps no BF16 weight of {linear} to put it into; "
                    "send them in one update"
                )
        return None

    def problem(self, name: str, tensor: torch.Tensor, device: torch.device) -> str | None:
        """Why ``tensor`` is refused, or None; its values are looked at on ``device``."""
        if self._unused(name):
            return None
        before = self.tensors.get(name)
        shape = before[0] if before else self.parameters.get(name)
        if shape is None and self.tensors:
            return f"{name} is no tensor of this model's checkpoint"
        if shape is not None and tuple(tensor.shape) != shape:
            return f"{name} has shape {list(tensor.shape)}, not {list(shape)}"
        if tensor.dtype not in FLOATING and (before is None or tensor.dtype != before[1]):
            wanted = before[1] if before else torch.bfloat16
            return f"{name} is {tensor.dtype}, not {wanted}: a quantised checkpoint does not fit this server"
        if self.quantised is not None and (problem := self.quantised.problem(name, tensor)):
            return problem
        return None if _finite(tensor, device) else f"{name} holds NaN or infinity, in BF16 at least"

    def differing(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
        """Why an update by ``tensors`` is refused: numbers that a layer holds as one are not equal in it."""
        if self.quantised is None:
            return None
        return self.quantised.differing({name: tensor for name, tensor in tensors if tensor.numel() == 1})

    def problem_of_parameter(
        self, name: str, tensor: torch.Tensor, parameters: dict[str, torch.nn.Parameter]
    ) -> str | None:
        """The same for ``load_format: direct``: names and shapes are those of SGLang's parameters on this rank."""
        if name not in parameters:
            return f"{name} is no parameter of the model"
        parameter = parameters[name]
        if parameter.is_meta:
            return f"{name} is not kept in BF16 by this recipe; send the checkpoint's tensors, not SGLang's parameters"
        own = Known({name: (tuple(parameter.shape), parameter.dtype)})
        return own.problem(name, tensor, parameter.device)


def _finite(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether all numbers are finite once they are BF16; others than floating point are."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        low, high = torch.aminmax(flat[start : start + _CHUNK].to(device))  # they propagate NaN
        if not all(math.isfinite(float(bound.to(torch.bfloat16))) for bound in (low, high)):
            return False
    return True
