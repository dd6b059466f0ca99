"""What a row of a forward pass is there for, and the precision that it takes in each kind of operator.

| role | rows |
|---|---|
| prompt | of a prompt, whose results later tokens see through the KV cache alone |
| protected | of a prefill pass, which the model answers from or which a request wants in BF16 (``passes/rows.py``) |
| decode | generated tokens |
| verify | drafted tokens that the served model looks at |
| draft | of the model that drafts |

A recipe's ``prefill`` speaks of prompt rows, its ``decode`` of all others.  Attention is BF16, but for prompt rows of
long prompts where ``prefill.attention`` says so; experts of a model that has none are BF16 here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum


class Role(Enum):
    PROMPT = "prompt"
    PROTECTED = "protected"
    DECODE = "decode"
    VERIFY = "verify"
    DRAFT = "draft"

    # By identity, as members are compared: Enum's own is a function in Python, and each linear of a pass looks one up.
    __hash__ = object.__hash__


class Kind(Enum):
    """Kinds of operators; ``linear`` are the dense ones, ``experts`` those of mixtures of experts."""

    LINEAR = "linear"
    EXPERTS = "experts"
    ATTENTION = "attention"


def by_role(prefill: str, decode: str) -> dict[Role, str]:
    """The precisions that ``prefill`` and ``decode`` of a recipe or a rule mean."""
    return {role: prefill if role is Role.PROMPT else decode for role in Role}


class PrecisionTable(Mapping[tuple[Role, Kind], str]):
    """(role, kind of operator) -> precision."""

    def __init__(
        self,
        linear: Mapping[Role, str],
        experts: Mapping[Role, str] | None = None,
        attention: Mapping[Role, str] | None = None,
    ) -> None:
        kinds = {Kind.LINEAR: linear, Kind.EXPERTS: experts or {}, Kind.ATTENTION: attention or {}}
        self._cells = {(role, kind): kinds.get(kind, {}).get(role, "bf16") for role in Role for kind in Kind}

    def __getitem__(self, cell: tuple[Role, Kind]) -> str:
        return self._cells[cell]

    def __iter__(self) -> Iterator[tuple[Role, Kind]]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    def row(self, role: Role) -> dict[str, str]:
        """Kind -> precision, in words."""
        return {kind.value: self[role, kind] for kind in Kind}

    def describe(self) -> str:
        """In words: roles that take the same together."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for role in Role:
            alike.setdefault(tuple(self.row(role).values()), []).append(role.value)
        return "; ".join(f"{', '.join(roles)} {self._words(cells)}" for cells, roles in alike.items())

    @staticmethod
    def _words(cells: tuple[str, ...]) -> str:
        if len({*cells}) == 1:
            return cells[0]
        return ", ".join(f"{precision} ({kind.value})" for kind, precision in zip(Kind, cells, strict=True))
