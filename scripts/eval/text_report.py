"""The tables and the picture of eval_text."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from scripts.eval.report import Results, figure, table

TITLES = {
    "kl": "KL of BF16's from the arm's distribution at each token of the answer, nats (lower bound)",
    "nll": "negative log-likelihood of the answer, nats per token",
    "same": "tokens until the greedy continuation first differs from BF16's",
    "identical": "share of greedy continuations that equal BF16's",
}


TURN_TITLES = {
    **{name: TITLES[name] for name in ("kl", "nll")},
    "first": "the same KL at the first token of each answer",
    "top1": "share of the answers' tokens where the arm's most probable token is BF16's (kept)",
    "exact": "share of turns whose every token is the arm's most probable: greedy, it would make the expected calls",
}


def perplexity(nll: list[float]) -> list[float]:
    """e to the mean and to the ends of its interval: the interval of the perplexity, because e^x keeps the order."""
    return [math.exp(x) for x in nll]


def share(found: list[float] | None) -> str:
    if found is None:
        return "nothing to recover"
    value, low, high = (100 * x for x in found)
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def summary(results: Results, arms: list[str]) -> str:
    """A row for each arm over all cells, in Markdown; documents quote it."""
    every = results["all"]
    lines = [
        "| arm | KL from BF16, nats | at the first token | perplexity | tokens to first difference | KL taken back | "
        "log-likelihood taken back |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        values = [figure(every[measure]["value"][arm]) for measure in ("kl", "kl 1")]
        values.append(figure(perplexity(every["nll"]["value"][arm])))
        values.append(figure(every["same"]["value"][arm]))
        values += [
            share(every[measure]["recovered"][arm]) if arm in every[measure]["recovered"] else "-"
            for measure in ("kl", "nll")
        ]
        lines.append(f"| {arm} | {' | '.join(values)} |")
    return "\n".join(lines)


def by_place(results: Results, arms: list[str]) -> str:
    every = results["all"]
    places = [name for name in every if name.startswith("kl ")]
    rows = [(arm, [figure(every[name]["value"][arm]) for name in places]) for arm in arms]
    return table("KL by place in the answer, from 1 [95% interval]", places, rows)


def tables(results: Results, arms: list[str]) -> str:
    """Over all cells, by place in the answer, and by cell and source: figures, differences, recovered shares."""
    out = [summary(results, arms), by_place(results, arms)]
    for measure, title in TITLES.items():
        for kind, head in (("value", title), ("minus", "paired difference"), ("recovered", "recovered share")):
            columns = list(results["all"][measure][kind])
            rows = [
                (group, [figure(found[measure][kind][name], kind == "minus") for name in columns])
                for group, found in results.items()
            ]
            if columns:
                out.append(table(f"{head} [95% interval]", columns, rows))
    return "\n\n".join(out)


def turn_summary(results: Results, arms: list[str]) -> str:
    """A row for each arm and mode over all turns but the first, where modes are alike, in Markdown."""
    later = results["later"]
    lines = [
        "| arm, from turn 2 on | KL from BF16 kept, nats | KL, flushed - kept | perplexity | top-1 as BF16's | "
        "exact turns | KL taken back | log-likelihood taken back |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (f"{arm}/{mode}" for arm in arms for mode in ("kept", "flushed")):
        minus = later["kl"]["minus"].get(f"{name} - {name.replace('/flushed', '/kept')}")
        values = [figure(later["kl"]["value"][name]), figure(minus, signed=True) if minus else "-"]
        values.append(figure(perplexity(later["nll"]["value"][name])))
        values += [figure(later[measure]["value"][name]) for measure in ("top1", "exact")]
        values += [
            share(later[measure]["recovered"][name]) if name in later[measure]["recovered"] else "-"
            for measure in ("kl", "nll")
        ]
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def turn_tables(results: Results, arms: list[str]) -> str:
    """Of each measure: figures, differences and recovered shares, a row for each arm and mode, by turn."""
    out = [turn_summary(results, arms)]
    columns = [f"{group} ({found['examples']})" for group, found in results.items()]
    for measure, title in TURN_TITLES.items():
        for kind, head in (("value", title), ("minus", "paired difference"), ("recovered", "recovered share")):
            rows = [
                (name, [figure(found[measure][kind][name], kind == "minus") for found in results.values()])
                for name in results["all"][measure][kind]
            ]
            if rows:
                out.append(table(f"{head} [95% interval], by turn (conversations)", columns, rows))
    return "\n\n".join(out)


def plot(results: Results, arms: list[str], path: Path, title: str) -> bool:
    """KL by arm and by place in the answer; False if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    shown = [arm for arm in arms if arm != "bf16"]
    every: dict[str, Any] = results["all"]
    found = [every["kl"]["value"][arm] for arm in shown]
    error = [[max(0.0, v - low) for v, low, _ in found], [max(0.0, high - v) for v, _, high in found]]
    left.barh(shown, [v for v, _, _ in found], xerr=error, color="#64748b", capsize=3)
    for place, arm in enumerate(shown):
        back = every["kl"]["recovered"].get(arm)
        text = f" {100 * back[0]:.0f}% taken back" if back else ""
        left.annotate(text, (found[place][2], place), va="center", fontsize=8)
    left.invert_yaxis()
    if found and min(v for v, _, _ in found) > 0:  # zero has no place on a logarithmic axis
        left.set_xscale("log")
        right.set_yscale("log")
    left.margins(x=0.35)
    left.set_xlabel("KL from BF16, nats per token")
    places = [name for name in every if name.startswith("kl ")]
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, arm in enumerate(shown):
        values = [every[name]["value"][arm] for name in places]
        spread = [[max(0.0, v - low) for v, low, _ in values], [max(0.0, high - v) for v, _, high in values]]
        look = {"color": colours[number % len(colours)], "marker": "os^vD"[number % 5], "markersize": 4}
        right.errorbar([name[3:] for name in places], [v for v, _, _ in values], spread, capsize=2, label=arm, **look)
    right.set_xlabel("token of the answer")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    drawing.suptitle(textwrap.fill(title, 150), fontsize=8)
    drawing.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(drawing)
    return True
