"""The tables and the plot of eval_accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {
    "accuracy": "accuracy, greedy (of text: of its tokens, each after the true ones)",
    "sampled": "accuracy, sampled (mean of an example's samples; of text: probability that a draw finds the token)",
    "kl": "KL of BF16's from the arm's distribution at each token of the reference answer, nats (lower bound)",
    "first": "the same KL at the first token of the answer",
    "nll": "negative log-likelihood of the reference answer, nats per token",
    "same": "tokens until the greedy answer first differs from BF16's (all of BF16's where it never does)",
    "identical": "share of greedy answers that equal BF16's",
    "tokens": "tokens of the greedy answer",
}
Results = dict[str, dict[str, Any]]


def figure(found: list[float] | None, signed: bool = False) -> str:
    if found is None:
        return "nothing to recover"
    large = max(map(abs, found)) >= 10
    value, low, high = (f"{x:{'+' if signed else ''}.{2 if large else 4}f}" for x in found)
    return f"{value} [{low}, {high}]"


def table(head: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    sizes = [max(len(name), *(len(cells[i]) for _, cells in rows)) for i, name in enumerate(columns)]
    first = max(len(name) for name, _ in rows) if rows else 0
    lines = [head, " " * first + "".join(f"  {name:>{size}}" for name, size in zip(columns, sizes, strict=True))]
    for name, cells in rows:
        lines.append(f"{name:<{first}}" + "".join(f"  {c:>{size}}" for c, size in zip(cells, sizes, strict=True)))
    return "\n".join(lines)


def tables(results: Results) -> str:
    """For each measure the figures by cell, task and in total, the paired differences, and the recovered shares."""
    out = []
    for measure, title in TITLES.items():
        for part, head in (("value", title), ("minus", "paired difference"), ("recovered", "recovered share")):
            columns = list(results["all"][measure][part])
            rows = [
                (group, [figure(found[measure][part][name], part == "minus") for name in columns])
                for group, found in results.items()
            ]
            if columns:
                out.append(table(f"{head} [95% interval]", columns, rows))
    return "\n\n".join(out)


def plot(results: Results, path: Path, title: str) -> bool:
    """Paired differences from BF16 by task; False if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in results if " " not in group]
    pairs = list(results["all"]["accuracy"]["minus"])
    grid, axes = pyplot.subplots(3, 3, figsize=(20, 3.4 * 3), layout="constrained")
    for axis, measure in zip(axes.flat, TITLES, strict=False):
        for i, pair in enumerate(pairs):
            found = [results[group][measure]["minus"][pair] for group in groups]
            places = [place + 0.8 * (i + 0.5) / len(pairs) - 0.4 for place in range(len(groups))]
            errors = [[max(0.0, v - low) for v, low, _ in found], [max(0.0, high - v) for v, _, high in found]]
            axis.errorbar(places, [v for v, _, _ in found], errors, fmt="o", capsize=2, markersize=4, label=pair)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(TITLES[measure], fontsize=8)
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", fontsize=9)
    grid.suptitle(title, fontsize=9)
    grid.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(grid)
    return True
