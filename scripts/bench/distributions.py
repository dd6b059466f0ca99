"""Distributions of TTFT and ITL as a picture, a row for each rate.  Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from scripts.bench.outcomes import Level, Slo

FORMS = (".svg", ".png")
POINTS = 1000  # of a curve


def missing(file: Path) -> str:
    """Why nothing can be drawn into ``file``; "" where it can."""
    if file.suffix not in FORMS:
        return f"{file} ends in none of {', '.join(FORMS)}"
    if not file.parent.is_dir():
        return f"{file.parent} is no folder"
    if importlib.util.find_spec("matplotlib") is None:
        return "needs matplotlib; run: pip install 'mixquant-sglang[plot]'"
    return ""


def curve(values: list[float], of: int) -> tuple[list[float], list[float]]:
    """(values, share of ``of`` at most that large): it ends below 1 where some have no value."""
    ordered = sorted(values)
    places = range(len(ordered))
    if len(ordered) > POINTS:
        places = range(0, len(ordered), len(ordered) // POINTS)
    # The largest one is the end of the tail, and always there.
    at = [*places, len(ordered) - 1] if ordered else []
    return [ordered[i] for i in at], [(i + 1) / of for i in at]


def plot(file: Path, found: dict[str, dict[str, Level]], slo: Slo, title: str) -> None:
    """``found``: levels by rate and arm.  TTFT by request, those without an answer counted; ITL by token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4 * len(found) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(found), 2, squeeze=False)
    for (rate, levels), (ttft, itl) in zip(found.items(), rows, strict=True):
        for name, level in levels.items():
            first = [1e3 * one.answer.ttft for one in level.outcomes if one.answer]
            between = [ms for one in level.outcomes for ms in one.itl()]
            ttft.plot(*curve(first, len(level.outcomes)), drawstyle="steps-post", label=name)
            itl.plot(*curve(between, max(1, len(between))), drawstyle="steps-post", label=name)
        for axis, what, limit in ((ttft, "ttft, share of requests", slo.ttft), (itl, "itl, share of tokens", slo.itl)):
            if limit is not None:
                axis.axvline(limit, color="0.5", linestyle=":", label=f"limit, {limit:g} ms")
            axis.set(xscale="log", xlabel="ms", ylim=(0, 1.01), title=f"{rate}: {what}")
            axis.grid(color="0.9")
            axis.legend(loc="lower right", fontsize="small")
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=110)
