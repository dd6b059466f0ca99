"""Protected rows: the token rows of a prefill pass that must take the decode column (BF16) all the same.

Per request these are a suffix of its new rows, because token positions only grow:

* the last prompt token (position ``prompt - 1``), since SGLang samples the first generated token from its row, or a
  longer tail of the prompt;
* generated tokens that are prefilled again after a retraction (positions from ``prompt`` on);
* everything, if the request is a decode row of a MIXED batch or asked for BF16 prefill.

``plan`` says which rows from facts of the requests alone.  ``EagerRows`` then are an index made for this pass,
``GraphRows`` a persistent index buffer that captured CUDA graphs read and that is refilled before each replay (-1 marks
an unused slot).

Nothing of such a row can be left out.  The first generated token depends on the last prompt token's row of every
linear, and later tokens read its keys and values; so each of its products takes the high path, and only a pass without
protected rows, a middle chunk of a long prompt for one, skips that work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
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
    """``protected`` are half-open ranges of row numbers, ascending, as is ``last``: the last row of each request, whose
    hidden state SGLang samples from; ``shares`` are each request's new rows and how many of them, the last ones, are
    protected; the counts are numbers of rows."""

    total: int
    prefill: int
    decode: int
    protected: tuple[tuple[int, int], ...]
    last: tuple[tuple[int, int], ...] = ()
    shares: tuple[tuple[int, int], ...] = ()

    @property
    def protected_total(self) -> int:
        return sum(stop - start for start, stop in self.protected)


def plan(requests: Iterable[RequestRows], *, last_prompt_token: bool, tail: int = 1) -> RowPlan:
    """Rows in the order of SGLang's extend layout: all new rows of the first request, then of the second, ...

    ``tail``: how many tokens at the end of each prompt ``last_prompt_token`` protects.
    """
    ranges: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    shares: list[tuple[int, int]] = []
    total = decode = 0
    for request in requests:
        first = request.prompt - tail if last_prompt_token else request.prompt
        if request.decoding or request.bf16:
            first = request.prefix
        kept = min(max(first - request.prefix, 0), request.new)
        if kept < request.new:
            start, stop = total + kept, total + request.new
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
        total += request.new
        last.append((total - 1, total))
        shares.append((request.new, request.new - kept))
        decode += request.new if request.decoding else 0
    return RowPlan(
        total=total,
        prefill=total - decode,
        decode=decode,
        protected=tuple(ranges),
        last=tuple(last),
        shares=tuple(shares),
    )


def row_numbers(ranges: Iterable[tuple[int, int]]) -> torch.Tensor:
    """int64 [R] on the CPU: the row numbers that the half-open ``ranges`` hold."""
    parts = [torch.arange(start, stop) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


class Rows(Protocol):
    """What a linear asks of the protected rows of the running pass of ``tokens`` rows."""

    @property
    def tokens(self) -> int: ...

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

    def __init__(self, tokens: int, ranges: tuple[tuple[int, int], ...], device: torch.device) -> None:
        self.tokens = tokens
        self._ranges = ranges
        self._device = device

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

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        from mixquant_sglang.kernels.triton.rows import gather_rows

        return gather_rows(x, self.index)

    def scatter(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        from mixquant_sglang.kernels.triton.rows import scatter_rows_

        scatter_rows_(out, rows, self.index)


class Queries:
    """The rows whose attention is looked at in the last layer of one pass, as varlen attention takes them.

    ``shares``: each request's new rows, at least one, and how many of them, the last ones, are looked at.  Where that
    is none, in a middle chunk, the last row is here all the same, so that no kernel sees a request without a query.
    """

    def __init__(self, shares: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.requests = len(shares)
        self.tokens = sum(new for new, _ in shares)
        self._ends = list(accumulate(new for new, _ in shares))
        self._counts = [max(read, 1) for _, read in shares]
        self.longest = max(self._counts)
        self._device = device

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 [R]: their row numbers, ascending."""
        ranges = ((end - count, end) for end, count in zip(self._ends, self._counts, strict=True))
        return row_numbers(ranges).to(self._device, non_blocking=True)

    @cached_property
    def starts(self) -> torch.Tensor:
        """int32 [requests + 1]: where each request's begin in ``index``, and R."""
        return torch.tensor([0, *accumulate(self._counts)], dtype=torch.int32).to(self._device, non_blocking=True)
