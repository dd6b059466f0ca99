"""What ran: token rows and passes by phase and precision, for ``/server_info`` and ``/metrics``.

Counts are taken when a pass is launched, from the request facts that chose its rows; warm-up passes count, graph
captures do not.  The Prometheus series exist only where SGLang's own do (``--enable-metrics``, on the ranks that
report) and carry SGLang's labels.  ``prometheus_client`` fixes its value class when it is imported, so it is imported
only once SGLang has set up its multiprocess directory.

A series has each label name once.  Where SGLang's labels, its users' (``--extra-metric-labels``) among them, have a
name of ours, theirs stays as it is, and ours gets the prefix ``mixquant_``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

logger = logging.getLogger(__name__)

LABELS = ("phase", "precision", "version", "recipe", "kernel")


def label_names(taken: Collection[str]) -> dict[str, str]:
    """Each of our labels -> its name beside the labels ``taken``."""
    names: dict[str, str] = {}
    for label in LABELS:
        name = label
        while name in taken or name in names.values():
            name = f"mixquant_{name}"
        names[label] = name
    return names


class PassCounters:
    """Plain integers; one instance per scheduler process."""

    def __init__(self) -> None:
        self.tokens: Counter[tuple[str, str]] = Counter()
        self.passes: Counter[tuple[str, str]] = Counter()
        self.protected_rows = 0
        self._series: _Series | None = None

    def add(self, phase: str, precision: str, tokens: Mapping[tuple[str, str], int], protected: int = 0) -> None:
        """Counts one pass of ``phase`` whose linears ran in ``precision``; ``tokens`` by (phase, precision)."""
        self.passes[phase, precision] += 1
        self.protected_rows += protected
        for key, rows in tokens.items():
            if rows:
                self.tokens[key] += rows
        if self._series:
            self._series.add(phase, precision, tokens, protected)

    def add_decode(self, precision: str, rows: int) -> None:
        """Counts one decode pass: ``add`` without its generality, since decode steps are short."""
        key = "decode", precision
        self.passes[key] += 1
        self.tokens[key] += rows
        if self._series:
            self._series.add("decode", precision, {key: rows}, 0)

    def attach(self, labels: Mapping[str, Any]) -> _Series:
        """Creates the Prometheus series, with SGLang's ``labels``, and carries over what was counted so far."""
        self._series = _Series(labels)
        own = self._series.own
        for (phase, precision), n in self.passes.items():
            self._series.passes.labels(**labels, **own(phase=phase, precision=precision)).inc(n)
        for (phase, precision), n in self.tokens.items():
            self._series.tokens.labels(**labels, **own(phase=phase, precision=precision)).inc(n)
        self._series.protected.labels(**labels).inc(self.protected_rows)
        return self._series

    def by_phase(self, phase: str) -> dict[str, int]:
        """Token rows of ``phase`` by precision."""
        return {precision: n for (name, precision), n in sorted(self.tokens.items()) if name == phase}

    def passes_of(self, phase: str) -> int:
        return sum(n for (name, _), n in self.passes.items() if name == phase)


class _Series:
    def __init__(self, labels: Mapping[str, Any]) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge

        self._labels = dict(labels)
        names = [*labels]
        self._names = label_names(labels)
        renamed = [f"{ours} is {name}" for ours, name in self._names.items() if ours != name]
        if renamed:
            logger.warning("mixquant: labels of the mixquant: series that SGLang has too: %s", ", ".join(renamed))
        phase, precision = self._names["phase"], self._names["precision"]
        self.tokens = PrometheusCounter(
            "mixquant:forward_tokens",
            "Token rows that ran, by phase and its precision (a rule may give layers another: mixquant:layers).",
            [*names, phase, precision],
        )
        self.passes = PrometheusCounter(
            "mixquant:forward_passes",
            "Forward passes, by phase and its precision.",
            [*names, phase, precision],
        )
        self.protected = PrometheusCounter(
            "mixquant:protected_rows", "Rows of prefill passes that took the decode precision.", names
        )
        gauge = {"multiprocess_mode": "mostrecent"}
        self._layers = Gauge("mixquant:layers", "Linear layers by prefill precision.", [*names, precision], **gauge)
        self._bytes = Gauge("mixquant:extra_weight_bytes", "Bytes of packed low-precision weights.", names, **gauge)
        self._info = Gauge(
            "mixquant:info",
            "Always 1; the labels describe the plugin.",
            [*names, *(self._names[name] for name in ("version", "recipe", "kernel"))],
            **gauge,
        )

    def own(self, **values: str) -> dict[str, str]:
        """Our labels under the names that they have here."""
        return {self._names[name]: value for name, value in values.items()}

    def add(self, phase: str, precision: str, tokens: Mapping[tuple[str, str], int], protected: int) -> None:
        self.passes.labels(**self._labels, **self.own(phase=phase, precision=precision)).inc()
        for (token_phase, token_precision), rows in tokens.items():
            if rows:
                own = self.own(phase=token_phase, precision=token_precision)
                self.tokens.labels(**self._labels, **own).inc(rows)
        if protected:
            self.protected.labels(**self._labels).inc(protected)

    def describe(self, *, version: str, recipe: str, kernel: str, layers: Mapping[str, int], extra_bytes: int) -> None:
        own = self.own(version=version, recipe=recipe, kernel=kernel)
        self._info.labels(**self._labels, **own).set(1)
        self._bytes.labels(**self._labels).set(extra_bytes)
        for precision, n in layers.items():
            self._layers.labels(**self._labels, **self.own(precision=precision)).set(n)
