"""Some rows of a pass, as kernels find them: indexes on the device.

``EagerRows`` are made for one pass, ``GraphRows`` is a persistent buffer that captured CUDA graphs read and that is
refilled before each replay (-1 marks an unused slot).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch


def row_numbers(ranges: Iterable[tuple[int, int]]) -> torch.Tensor:
    """int64 [R] on the CPU: the row numbers that the half-open ``ranges`` hold."""
    parts = [torch.arange(start, stop) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


class Rows(Protocol):
    """What a linear asks of the protected rows of the running pass of ``tokens`` rows."""

    @property
    def tokens(self) -> int: ...

    @property
    def captured(self) -> bool:
        """Whether how many there are is known only when the kernels run."""

    @property
    def index(self) -> torch.Tensor:
        """int64 [R]: their row numbers; -1 marks an unused slot, after all used ones."""

    @property
    def places(self) -> torch.Tensor:
        """int64 [R]: 0, 1, 2, ... where ``index`` has a row number, -1 in unused slots."""

    @property
    def slots(self) -> torch.Tensor:
        """int32 [tokens], the inverse: where a row is in ``index``, -1 if it is not protected."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, K], contiguous -> its protected rows [R, K]."""

    def scatter(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """Puts ``rows`` [R, N] in their places of ``out`` [T, N], contiguous."""


class EagerRows:
    """Rows ``ranges`` of one pass of ``tokens`` rows that runs eagerly: none unused; the tensors are made when the
    first layer asks."""

    captured = False

    def __init__(self, tokens: int, ranges: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.tokens = tokens
        self._ranges = ranges
        self._device = device

    def padded(self, tokens: int) -> EagerRows:
        """The same rows of a pass that has ``tokens`` rows."""
        return EagerRows(tokens, self._ranges, self._device)

    @cached_property
    def index(self) -> torch.Tensor:
        return row_numbers(self._ranges).to(self._device, non_blocking=True)

    @cached_property
    def places(self) -> torch.Tensor:
        return torch.arange(len(self.index), device=self._device)

    @cached_property
    def slots(self) -> torch.Tensor:
        slots = torch.full((self.tokens,), -1, dtype=torch.int32, device=self._device)
        slots[self.index] = torch.arange(len(self.index), dtype=torch.int32, device=self._device)
        return slots

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self.index)

    def scatter(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        out.index_copy_(0, self.index, rows)


class GraphRows:
    """The buffers on the GPU that captured prefill graphs read: ``capacity`` row numbers, and their inverse.

    A graph captured for T token rows, at most ``tokens``, reads the first ``min(capacity, T)`` row numbers and the
    first T slots, so all graphs share these buffers.  Rows that are only picked out need no inverse: with
    ``inverse=False`` there are no slots, and to fill the buffers is one copy.
    """

    def __init__(self, capacity: int, tokens: int, device: torch.device, *, inverse: bool = True) -> None:
        self.capacity = capacity
        self._tokens = tokens
        self._inverse = inverse
        self._numbers = torch.full((2, capacity), -1, dtype=torch.int64, device=device)
        self.index, self._places = self._numbers
        self._slots = torch.full((tokens if inverse else 0,), -1, dtype=torch.int32, device=device)
        self._order = torch.arange(capacity, dtype=torch.int32, device=device)
        self._loaded: tuple[tuple[int, int], ...] = ()

    def fill(self, ranges: tuple[tuple[int, int], ...]) -> None:
        """Loads the rows of the pass about to be replayed, on the current stream; at most ``capacity`` of them."""
        if ranges == self._loaded:
            return
        self._loaded = ranges
        staged = torch.full((2, self.capacity), -1, dtype=torch.int64)
        numbers = row_numbers(ranges)
        used = len(numbers)
        staged[0, :used] = numbers
        staged[1, :used] = torch.arange(used)
        self._numbers.copy_(staged, non_blocking=True)
        if self._inverse:
            self._slots.fill_(-1)
            self._slots.index_copy_(0, self.index[:used], self._order[:used])

    def of(self, tokens: int) -> CapturedRows:
        if tokens > self._tokens:
            raise ValueError(f"a prefill graph of {tokens} rows, where the largest was to have {self._tokens}")
        used = min(self.capacity, tokens)
        return CapturedRows(tokens, self.index[:used], self._places[:used], self._slots[:tokens])


@dataclass(frozen=True, eq=False)
class CapturedRows:
    """Protected rows as a graph of ``tokens`` rows sees them: kernels that read the buffers when they run."""

    tokens: int
    index: torch.Tensor
    places: torch.Tensor
    slots: torch.Tensor
    captured: ClassVar[bool] = True

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        from mixquant_sglang.kernels.triton.rows import gather_rows

        return gather_rows(x, self.index)

    def scatter(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        from mixquant_sglang.kernels.triton.rows import scatter_rows_

        scatter_rows_(out, rows, self.index)
