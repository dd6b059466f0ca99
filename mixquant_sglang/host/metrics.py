"""What ran (``passes/counters.py``), as series of ``/metrics``.

They exist only where SGLang's own do (``--enable-metrics``, on the ranks that
report) and carry SGLang's labels.  ``prometheus_client`` fixes its value class when it is imported, so it is imported
only once SGLang has set up its multiprocess directory.

A series has each label name once.  Where SGLang's labels, its users' (``--extra-metric-labels``) among them, have a
name of ours, theirs stays as it is, and ours gets the prefix ``mixquant_``.
"""

from __future__ import annotations

import logging
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


class PrometheusSeries:
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
        self._bytes = Gauge("mixquant:extra_weight_bytes", "Bytes of weights beside those of BF16.", names, **gauge)
        self._info = Gauge(
            "mixquant:info",
            "Always 1; the labels describe the plugin.",
            [*names, *(self._names[name] for name in ("version", "recipe", "kernel"))],
            **gauge,
        )

    def own(self, **values: str) -> dict[str, str]:
        """Our labels under the names that they have here."""
        return {self._names[name]: value for name, value in values.items()}

    def carry_over(
        self, passes: Mapping[tuple[str, str], int], tokens: Mapping[tuple[str, str], int], protected: int
    ) -> None:
        """Adds what was counted before the series were there."""
        for (phase, precision), n in passes.items():
            self.passes.labels(**self._labels, **self.own(phase=phase, precision=precision)).inc(n)
        for (phase, precision), n in tokens.items():
            self.tokens.labels(**self._labels, **self.own(phase=phase, precision=precision)).inc(n)
        self.protected.labels(**self._labels).inc(protected)

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
