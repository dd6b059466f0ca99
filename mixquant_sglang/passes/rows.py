"""Protected rows: the token rows of a prefill pass that must not take the prompt's precision.

Per request these are a suffix of its new rows, because token positions only grow:

* the last prompt token (position ``prompt - 1``), since SGLang samples the first generated token from its row, or a
  longer tail of the prompt;
* generated tokens that are prefilled again after a retraction (positions from ``prompt`` on);
* everything, if the request is a decode row of a MIXED batch or asked for BF16 prefill.

``split_rows`` says which rows, from facts of the requests alone; ``kernels/rows.py`` has the indexes that kernels read.

Nothing of such a row can be left out.  The first generated token depends on the last prompt token's row of every
linear, and later tokens read its keys and values; so each of its products takes the high path, and only a pass without
protected rows, a middle chunk of a long prompt for one, skips that work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


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
class RowSplit:
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


def split_rows(requests: Iterable[RequestRows], *, last_prompt_token: bool, tail: int = 1) -> RowSplit:
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
        low = min(max(first - request.prefix, 0), request.new)
        if low < request.new:
            start, stop = total + low, total + request.new
            if ranges and ranges[-1][1] == start:
                start = ranges.pop()[0]
            ranges.append((start, stop))
        total += request.new
        last.append((total - 1, total))
        shares.append((request.new, request.new - low))
        decode += request.new if request.decoding else 0
    return RowSplit(
        total=total,
        prefill=total - decode,
        decode=decode,
        protected=tuple(ranges),
        last=tuple(last),
        shares=tuple(shares),
    )
