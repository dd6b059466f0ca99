"""What a checkpoint lacks: weights that the model has and no file of it.

SGLang leaves such weights as memory was when it took it, and says nothing.  A name that is not there is no proof, since
loaders rename: it is where other blocks have that very name, where other parts of the same linear are there, and where
the name is one that the Hugging Face Hub has for all dense models.  No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mixquant_sglang.recipe.modules import FUSED, is_draft, is_outside

_NUMBER = re.compile(r"((?:^|\.)layers\.)\d+\.")
_OUTER = re.compile(r"(?:embed_tokens|norm)\.weight$")
_USUAL = frozenset({*(part for parts in FUSED.values() for part in parts), "o_proj", "down_proj"})
# Of blocks that read keys and values of others, or keys as values: what a checkpoint may do without, by key of config.
_SPARED = {
    "num_kv_shared_layers": re.compile(r".*\.self_attn\.[kv]_(?:proj|norm)\..*"),
    "use_cla": re.compile(r".*\.self_attn\.[kv]_(?:proj|norm)\..*"),
    "attention_k_eq_v": re.compile(r".*\.self_attn\.v_(?:proj|norm)\..*"),
}


@dataclass(frozen=True)
class Contents:
    """``names``: of all tensors, with ``X.weight`` for a quantised module X; ``config``: its config.json."""

    names: frozenset[str]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, tensors: Iterable[str], modules: Iterable[str], config: Mapping[str, Any]) -> Contents:
        return cls(frozenset(tensors) | {f"{module}.weight" for module in modules}, config)

    def lacks(self, names: Sequence[str]) -> str | None:
        """The first of ``names``, the checkpoint's of the tensors of one parameter, that is missing; None if all are
        there, or may be there under names that nobody knows here."""
        gone = [name for name in names if not (name in self.names or is_outside(name) or is_draft(name))]
        others = len(gone) < len(names)
        return next((n for n in gone if (others or self._elsewhere(n) or _usual(n)) and not self._spared(n)), None)

    def lacks_below(self, layer: str) -> str | None:
        """A tensor below the module ``layer`` that other blocks have below theirs, and this one has not."""
        head = f"{_numberless(layer + '.')}"
        if is_outside(f"{layer}.") or head == f"{layer}.":
            return None
        own = (f"{layer}.{name.removeprefix(head)}" for name in self._numberless if name.startswith(head))
        return min((name for name in own if name not in self.names), default=None)

    def lacks_outside_blocks(self, name: str) -> str | None:
        """``name`` if it is missing, and the table of tokens or the last norm beside blocks that are named as here, or
        an lm_head that the config says is not tied."""
        if name in self.names or is_outside(name):
            return None
        if name == "lm_head.weight":
            return name if self.config.get("tie_word_embeddings") is False else None
        head = name.removesuffix(found[0]) if (found := _OUTER.search(name)) else None
        blocks = any(each.startswith(f"{head}layers.") for each in self.names)
        return name if head is not None and blocks else None

    def _elsewhere(self, name: str) -> bool:
        return _NUMBER.search(name) is not None and _numberless(name) in self._numberless

    def _spared(self, name: str) -> bool:
        said = (self.config, self.config.get("text_config") or {})
        return any(found.fullmatch(name) for key, found in _SPARED.items() if any(each.get(key) for each in said))

    @cached_property
    def _numberless(self) -> frozenset[str]:
        return frozenset(map(_numberless, self.names))


def _usual(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and _NUMBER.search(name) is not None and module.rpartition(".")[2] in _USUAL


def _numberless(name: str) -> str:
    return _NUMBER.sub(r"\1#.", name, count=1)
