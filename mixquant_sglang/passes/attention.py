"""The rows of a prefill pass whose attention runs in low precision, and those whose attention does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from mixquant_sglang.kernels.limits import FP8_ROWS
from mixquant_sglang.kernels.rows import row_numbers
from mixquant_sglang.passes.rows import RequestRows


@dataclass(frozen=True, slots=True)
class LowLimits:
    """Which requests: of ``tokens`` tokens or more with their prefixes, at most ``most``, of which ``rows`` or more are
    new."""

    tokens: int
    most: int

    @property
    def rows(self) -> int:
        return min(FP8_ROWS, self.tokens)

    def take(self, request: RequestRows) -> bool:
        return request.new >= self.rows and self.tokens <= request.prefix + request.new <= self.most


@dataclass(frozen=True, slots=True)
class LowRequest:
    """Request ``number`` of a pass, whose ``new`` rows behind ``prefix`` tokens begin at row ``start``; the last
    ``high`` of them are protected."""

    number: int
    start: int
    new: int
    prefix: int
    high: int

    @property
    def whole(self) -> int:
        return self.prefix + self.new

    @property
    def low(self) -> slice:
        """Its rows in low precision."""
        return slice(self.start, self.start + self.new - self.high)


class HighRows:
    """The other rows, as varlen attention takes them: of each request that has some, the last ``counts`` new ones.

    ``index`` int64 [R]: row numbers; ``requests`` int64 [B]; ``starts`` int32 [B + 1]: where each request's begin in
    ``index``, and R; ``whole_starts`` int32 [B + 1]: the same of all their tokens."""

    def __init__(self, rows: Sequence[tuple[int, int, int, int]], device: torch.device) -> None:
        """``rows``: number, end of its rows, how many, all tokens of each request."""
        numbers, ends, counts, wholes = zip(*rows, strict=True)

        def on_device(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        self.longest: int = max(counts)
        self.index = on_device(row_numbers((end - n, end) for end, n in zip(ends, counts, strict=True)))
        self.requests = on_device(torch.tensor(numbers))
        self.starts = on_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32))
        self.whole_starts = on_device(torch.tensor([0, *accumulate(wholes)], dtype=torch.int32))


class LowRows:
    """Of one pass."""

    def __init__(
        self,
        requests: Sequence[RequestRows],
        shares: Sequence[tuple[int, int]],
        limits: LowLimits,
        device: torch.device,
    ) -> None:
        """``shares``: each request's new rows and how many of them, the last ones, are protected."""
        self._device = device
        self._high: list[tuple[int, int, int, int]] = []
        self.requests: list[LowRequest] = []
        self.tokens = 0
        for number, (request, (new, high)) in enumerate(zip(requests, shares, strict=True)):
            if high < new and limits.take(request):
                self.requests.append(LowRequest(number, self.tokens, new, request.prefix, high))
            else:
                high = new
            self.tokens += new
            if high:
                self._high.append((number, self.tokens, high, request.prefix + new))

    @property
    def rows(self) -> int:
        """How many rows are low."""
        return sum(request.new - request.high for request in self.requests)

    @cached_property
    def high(self) -> HighRows | None:
        return HighRows(self._high, self._device) if self._high else None
