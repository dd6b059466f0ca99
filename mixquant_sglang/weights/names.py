"""What a checkpoint calls the modules that SGLang has.

Within a block SGLang has the checkpoint's names. Before it, wrappers differ: SGLang has Gemma-3's language model as
``language_model.model.layers.0``, files have that or ``model.language_model.layers.0``. A checkpoint has one language
model, so what stands before its blocks there takes the place of what stands there here; towers and draft layers, which
have blocks too, do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mixquant_sglang.recipe.modules import is_draft, is_outside

_EXPERT = re.compile(r"(.*\.\d+)\.(?:gate_proj|up_proj|w1|w3)\.weight")
_HEAD = re.compile(r"((?:.*?\.)?)layers\.\d+\.")


class Names:
    """Of one checkpoint."""

    def __init__(self, tensors: Iterable[str]) -> None:
        own = (name for name in tensors if not is_draft(name) and not is_outside(name))
        self._heads = {found[1] for name in own if (found := _HEAD.match(name))}

    def of(self, name: str) -> str:
        """The checkpoint's name of SGLang's module, or parameter, ``name``; as it is, where none is surely its, or
        where it is not the language model's."""
        found = _HEAD.match(name)
        if found is None or is_outside(name) or is_draft(name) or found[1] in self._heads or len(self._heads) != 1:
            return name
        (head,) = self._heads
        return head + name.removeprefix(found[1])


def gates_and_ups(tensors: Iterable[str], layer: str) -> dict[str, frozenset[str]]:
    """Of the experts of ``layer`` that have a tensor for each matrix: the module of an expert -> those of its gate and
    up projections, which are one weight here (``w1`` and ``w3`` in Mixtral's names)."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        if name.startswith(f"{layer}.") and (of := _EXPERT.fullmatch(name)):
            found.setdefault(of[1], set()).add(name)
    return {f"{expert} (gate and up)": frozenset(names) for expert, names in found.items()}
