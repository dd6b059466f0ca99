"""One linear of SGLang out of a quantised checkpoint: gathers what this rank holds of its tensors, as they arrive.

The pieces are those of the checkpoint, bit for bit.  Parts of a fused linear (q, k, v) become one where nothing has to
be rounded for it: scales of rows always; tensor scales of NVFP4 where they are equal; blocks of 128 rows where a part
ends with a whole one.  Else they stay parts, with a GEMM each.  What was joined at load has to stay so, since captured
graphs hold it.

Refused (MixQuantError): shapes that are not the linear's, and shares of ranks that cut a block of scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK, TILE
from mixquant_sglang.formats.fp8_blocks import FP8Blocks
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.linear.base import Piece
from mixquant_sglang.weights.pieces import Kind, Parts, piece, tensor_scale
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.ready_made_linear import Share

Whole = Callable[[dict[tuple[int, str], torch.Tensor]], None]


@dataclass
class QuantisedLinear:
    """``modules`` of the checkpoint hold the parts of ``name`` in order, or a single one all of them. ``whole`` is
    called with all that arrived, once it is all, and must not keep it."""

    checkpoint: QuantisedCheckpoint
    name: str
    modules: tuple[str, ...]
    share: Share | None = None
    device: torch.device | None = None
    whole: Whole = lambda _: None
    joined: tuple[int, ...] | None = None  # of the parts, how many make each piece; None before the first packing
    _there: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(self.checkpoint.modules[module] for module in self.modules)

    @property
    def form(self) -> str:
        """That of its kernels."""
        return "blocks" if self.kinds[0].form == "blocks" else ""

    def cannot_be_taken(self, why: str) -> str:
        """The line with which a start ends where no kernel packs it."""
        return (
            f"{self.checkpoint.folder}: {self.name} cannot be taken as it is: {why}; keep it in BF16 with the rule "
            f"'{{match: {self.name}, prefill: bf16, decode: bf16}}'"
        )

    @property
    def begun(self) -> bool:
        """Whether some of it has arrived, and not all."""
        return bool(self._there)

    def forget(self) -> None:
        """Drops what has arrived."""
        self._there = {}

    def place(self, share: Share, device: torch.device, whole: Whole) -> None:
        """Fixes the slices."""
        self.share, self.device, self.whole = share, device, whole
        full = [share.rows(part)[1] for part in range(len(share.sizes))]
        where = f"{self.checkpoint.folder}: {self.name}"
        if len(self.modules) > 1 and len(full) != len(self.modules):
            raise MixQuantError(f"{where} has {len(full)} parts here, but {', '.join(self.modules)} there")
        sizes = full if len(self.modules) > 1 else [sum(full)]
        for module, kind, n in zip(self.modules, self.kinds, sizes, strict=True):
            if kind.shape != (n, share.full_k):
                raise MixQuantError(f"{where} needs [{n}, {share.full_k}], but {module} is {list(kind.shape)}")
        for part in range(len(share.sizes)):
            kind = self._kind(part)
            rows, columns = self._slices(part)
            width = {"nvfp4": BLOCK, "blocks": TILE}.get(kind.form, 1)
            cut = columns.start % width or (columns.stop % width and columns.stop != share.full_k)
            if kind.form == "blocks":
                cut = cut or rows.start % TILE or (rows.stop % TILE and rows.stop != kind.shape[0])
            if cut:
                raise MixQuantError(
                    f"{where}: part {part} on rank {share.rank} of {share.ranks} has the rows {rows.start} to "
                    f"{rows.stop} and columns {columns.start} to {columns.stop} of {list(kind.shape)}, which cut a "
                    "block of scales; use fewer ranks, or a rule that keeps it in BF16"
                )
        self.checkpoint.takers.update(dict.fromkeys(self.modules, self))

    def take(self, module: str, leaf: str, tensor: torch.Tensor) -> None:
        """One tensor of ``module`` in full; what came before of the same name is no more."""
        assert self.share is not None and self.device is not None
        for part in self._parts_of(module):
            rows, columns = self._slices(part)
            cut = self._kind(part).slices(leaf, tensor, rows, columns)
            self._there[part, leaf] = cut.to(self.device, copy=True)
        if len(self._there) == sum(len(self._kind(part).leaves) for part in range(len(self.share.sizes))):
            there = self._there
            self.forget()
            self.whole(there)

    def pieces(self, there: Mapping[tuple[int, str], torch.Tensor]) -> list[Piece]:
        """What arrived, as weights, joined as at load. ValueError for numbers that are none, and for tensor scales that
        differ where they were equal."""
        assert self.share is not None
        parts: list[Piece] = []
        for part in range(len(self.share.sizes)):
            named: Parts = {leaf: tensor for (of, leaf), tensor in there.items() if of == part}
            parts.append(piece(self.modules[part if len(self.modules) > 1 else 0], self._kind(part), named))
        joined = self.joined or _joined(parts)
        done, made = 0, []
        for count in joined:
            made.append(_one(parts[done : done + count], self.name))
            done += count
        self.joined = joined
        return made

    def differing(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Why an update by ``tensors``, by name, is refused: scales that are one here are not equal there, and in what
        a session has brought of this weight before, while it is not whole."""
        layout = self.kinds[0].layout
        if layout is None or self.joined is None or len(self.modules) == 1:
            return None
        leaf, done = layout.tensor_scale, 0
        for count in self.joined:
            parts = range(done, done + count)
            done += count
            new = {f"{self.modules[part]}.{leaf}": part for part in parts}
            new = {name: part for name, part in new.items() if name in tensors}
            before = [part for part in parts if part not in new.values() and (part, leaf) in self._there]
            found = {name: float(tensor_scale(layout, tensors[name])) for name in new}
            values = {*found.values(), *(float(tensor_scale(layout, self._there[part, leaf])) for part in before)}
            if new and len(values) > 1:
                others = [*new, *(f"{self.modules[part]}.{leaf}, which came before" for part in before)]
                return (
                    f"{others[0]} is not that of {', '.join(others[1:])}, with which it was loaded as one: send both "
                    "with one number, or start the server again"
                )
        return None

    def _parts_of(self, module: str) -> Sequence[int]:
        assert self.share is not None
        if len(self.modules) == 1:
            return range(len(self.share.sizes))
        return [part for part, name in enumerate(self.modules) if name == module]

    def _kind(self, part: int) -> Kind:
        return self.kinds[part if len(self.modules) > 1 else 0]

    def _slices(self, part: int) -> tuple[slice, slice]:
        """Rows and columns of the module."""
        share = self.share
        assert share is not None
        first, _ = share.rows(part)
        if len(self.modules) == 1:
            first += sum(share.rows(before)[1] for before in range(part))
        begin = share.rank * share.k if share.k != share.full_k else 0
        return slice(first, first + share.sizes[part]), slice(begin, begin + share.k)


def _joined(parts: Sequence[Piece]) -> tuple[int, ...]:
    """Neighbours that can be one, counted."""
    counts = [1]
    for before, after in pairwise(parts):
        if isinstance(before, NVFP4Tensor) and isinstance(after, NVFP4Tensor):
            same = bool(before.tensor_scale == after.tensor_scale)
        else:
            same = not isinstance(before, FP8Blocks) or before.shape[0] % TILE == 0
        if same:
            counts[-1] += 1
        else:
            counts.append(1)
    return tuple(counts)


def _one(parts: Sequence[Any], name: str) -> Piece:
    """``parts`` of one kind below each other."""
    first: Piece = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, NVFP4Tensor):
        if not all(bool(part.tensor_scale == first.tensor_scale) for part in parts):
            raise ValueError(f"the tensor scales of {name}'s parts differ, and captured graphs hold them as one")
        scales = torch.cat([part.block_scales.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
        return NVFP4Tensor(torch.cat([part.packed for part in parts]), scales, first.tensor_scale)
    codes = torch.cat([part.data.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return type(first)(codes, torch.cat([part.scales for part in parts]))
