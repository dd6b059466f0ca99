"""What ran: token rows and passes by phase and precision.

Counts are taken when a pass is launched, from the request facts that chose its rows; warm-up passes count, graph
captures do not.  Of speculative decoding, ``verify`` counts the drafted rows that the served model looked at, which are
more than the tokens that came of them; what a draft model runs is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol


class Series(Protocol):
    """Counts elsewhere what ``PassCounters`` counts (``host/metrics.py``)."""

    def add(self, phase: str, precision: str, tokens: Mapping[tuple[str, str], int], protected: int) -> None: ...

    def carry_over(
        self, passes: Mapping[tuple[str, str], int], tokens: Mapping[tuple[str, str], int], protected: int
    ) -> None: ...


class PassCounters:
    """Plain integers; one instance per scheduler process."""

    def __init__(self) -> None:
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.passes: Counter[tuple[str, str]] = Counter()
        self.protected_rows = 0
        self.short_passes = self.short_rows = 0  # that stayed BF16 because they were below min_tokens
        self._series: Series | None = None

    def add(self, phase: str, precision: str, tokens: Mapping[tuple[str, str], int], protected: int = 0) -> None:
        """Counts one pass of ``phase`` whose linears ran in ``precision``; ``tokens`` by (phase, precision)."""
        self.passes[phase, precision] += 1
        self.protected_rows += protected
        for key, rows in tokens.items():
            if rows:
                self.tokens[key] += rows
        if self._series:
            self._series.add(phase, precision, tokens, protected)

    def add_short(self, rows: int) -> None:
        """Of a pass that ``add`` counts too."""
        self.short_passes += 1
        self.short_rows += rows

    def add_rows(self, phase: str, precision: str, rows: int) -> None:
        """Counts one pass of rows that are all alike: ``add`` without its generality, since decode steps are short."""
        key = phase, precision
        self.passes[key] += 1
        self.tokens[key] += rows
        if self._series:
            self._series.add(phase, precision, {key: rows}, 0)

    def attach(self, series: Series) -> None:
        """Carries over what was counted so far, and counts there too from now on."""
        self._series = series
        series.carry_over(self.passes, self.tokens, self.protected_rows)

    def by_phase(self, phase: str) -> dict[str, int]:
        """Token rows of ``phase`` by precision."""
        return {precision: n for (name, precision), n in sorted(self.tokens.items()) if name == phase}

    def passes_of(self, phase: str) -> int:
        return sum(n for (name, _), n in self.passes.items() if name == phase)
