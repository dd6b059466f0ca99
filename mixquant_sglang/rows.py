"""Protected rows: the token rows of a prefill pass that must take the decode column (BF16) all the same.

Per request these are a suffix of its new rows, because token positions only grow:

* the last prompt token (position ``prompt - 1``), since SGLang samples the first generated token from its row;
* generated tokens that are prefilled again after a retraction (positions from ``prompt`` on);
* everything, if the request is a decode row of a MIXED batch or asked for BF16 prefill.

``plan`` says which rows from facts of the requests alone.  ``EagerRows`` and ``GraphRows`` then overwrite these rows of
a linear's output: the former with an index made for this pass, the latter with one persistent index buffer that a
captured CUDA graph reads and that is refilled before each replay (-1 marks an unused slot).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class RequestRows:
    """One request's share of a prefill pass: ``new`` token rows after ``prefix`` cached ones, of ``prompt`` prompt
    tokens in all; ``decoding`` for a decode row of a MIXED batch, ``bf16`` if the request asked for BF16 prefill."""

    new: int
    prefix: int
    prompt: int
    decoding: bool = False
    bf16: bool = False


@dataclass(frozen=True, slots=True)
class RowPlan:
    """``protected`` are half-open ranges of row numbers, ascending; the counts are numbers of rows."""

    total: int
    prefill: int
    decode: int
    protected: tuple[tuple[int, int], ...]

    @property
    def protected_total(self) -> int:
        return sum(stop - start for start, stop in self.protected)


def plan(requests: Iterable[RequestRows], *, last_prompt_token: bool) -> RowPlan:
    """Rows in the order of SGLang's extend layout: all new rows of the first request, then of the second, ..."""
    ranges: list[tuple[int, int]] = []
    total = decode = 0
    for request in requests:
        first = request.prompt - 1 if last_prompt_token else request.prompt
        if request.decoding or request.bf16:
            first = request.prefix
        kept = min(max(first - request.prefix, 0), request.new)
        if kept < request.new:
            start, stop = total + kept, total + request.new
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
        total += request.new
        decode += request.new if request.decoding else 0
    return RowPlan(total=total, prefill=total - decode, decode=decode, protected=tuple(ranges))


def row_numbers(ranges: Iterable[tuple[int, int]]) -> torch.Tensor:
    """int64 [R] on the CPU: the row numbers that the half-open ``ranges`` hold."""
    parts = [torch.arange(start, stop) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


Linear = Callable[[torch.Tensor], torch.Tensor]


class Rows(Protocol):
    """What a linear method asks of the protected rows of the running pass."""

    tokens: int

    def overwrite(self, out: torch.Tensor, x: torch.Tensor, high: Linear) -> None:
        """``out[rows] = high(x[rows])`` in place; x [T, K], out [T, N], both contiguous."""


class EagerRows:
    """Rows of one pass that runs eagerly: an int64 index [R], R > 0, made when the first layer asks for it."""

    def __init__(self, row_plan: RowPlan, device: torch.device) -> None:
        self.tokens = row_plan.total
        self._ranges = row_plan.protected
        self._device = device

    @cached_property
    def index(self) -> torch.Tensor:
        return row_numbers(self._ranges).to(self._device, non_blocking=True)

    def overwrite(self, out: torch.Tensor, x: torch.Tensor, high: Linear) -> None:
        out.index_copy_(0, self.index, high(x.index_select(0, self.index)))


class GraphRows:
    """The index buffer, int64 [capacity] on the GPU, that captured prefill graphs read; -1 marks an unused slot.

    A graph captured for T token rows reads the first ``min(capacity, T)`` slots, so every graph shares this buffer.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.index = torch.full((capacity,), -1, dtype=torch.int64, device=device)

    def fill(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Loads the rows of the pass about to be replayed, on the current stream; at most ``capacity`` of them."""
        staged = torch.full((self.capacity,), -1, dtype=torch.int64)
        numbers = row_numbers(ranges)
        staged[: len(numbers)] = numbers
        self.index.copy_(staged, non_blocking=True)

    def of(self, tokens: int) -> CapturedRows:
        return CapturedRows(tokens, self.index[: min(self.capacity, tokens)])


class CapturedRows:
    """Protected rows as a graph of ``tokens`` rows sees them: kernels that read the index when they run."""

    def __init__(self, tokens: int, index: torch.Tensor) -> None:
        self.tokens = tokens
        self.index = index

    def overwrite(self, out: torch.Tensor, x: torch.Tensor, high: Linear) -> None:
        from mixquant_sglang.kernels.triton.rows import gather_rows, scatter_rows_

        scatter_rows_(out, high(gather_rows(x, self.index)), self.index)
