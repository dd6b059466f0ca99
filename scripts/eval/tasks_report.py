"""The tables of eval_tasks."""

from __future__ import annotations

from typing import Any

from scripts.eval.report import Results, figure, table
from scripts.eval.text_report import share


def points(found: list[float]) -> str:
    """Percent, with its interval."""
    value, low, high = (100 * x for x in found)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def difference(found: list[float]) -> str:
    value, low, high = (100 * x for x in found)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def summary(name: str, results: Results, arms: list[str], measure: str) -> str:
    """A row for each arm over all cells, in Markdown; documents quote it."""
    every: dict[str, Any] = results["all"]
    lines = [
        f"| {name} | right, % | - bf16, points | taken back | cut off, % | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for arm in arms:
        found = every[measure]
        minus = difference(found["minus"][f"{arm} - bf16"]) if f"{arm} - bf16" in found["minus"] else "-"
        back = share(found["recovered"][arm]) if arm in found["recovered"] else "-"
        cut, tokens = (every[f"{measure}, {what}"]["value"][arm] for what in ("cut off", "tokens"))
        row = (points(found["value"][arm]), minus, back, f"{100 * cut[0]:.1f}", figure(tokens))
        lines.append(f"| {arm} | {' | '.join(row)} |")
    return "\n".join(lines)


def tables(results: dict[str, Results], arms: list[str]) -> str:
    """For each family of tasks, greedy and sampled: all of it, then by cell."""
    out = []
    for name, found in results.items():
        measure = name.rpartition(", ")[2]
        out.append(summary(name, found, arms, measure))
        for kind, head, show in (
            ("value", "right, %", points),
            ("minus", "paired difference, points", difference),
            ("recovered", "recovered share", share),
        ):
            columns = list(found["all"][measure][kind])
            rows = [(group, [show(one[measure][kind][column]) for column in columns]) for group, one in found.items()]
            if columns:
                out.append(table(f"{name}: {head} [95% interval]", columns, rows))
    return "\n\n".join(out)
