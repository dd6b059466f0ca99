"""The queries of the last layer's attention that somebody looks at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch

from mixquant_sglang.kernels.rows import row_numbers


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
