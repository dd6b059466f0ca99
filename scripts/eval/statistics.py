"""Means, paired differences and recovered shares of eval_accuracy, each with its bootstrap interval.

A cell is a task at a length; its examples are drawn with replacement, the same draw for all arms and measures (that is
the pairing), and an example brings all of its samples along.  A group is a cell, a task (the mean of its cells) or
"all" (the mean of all cells).  Intervals are percentiles (2.5, 97.5) of the group's statistic over the draws.
They have no width where all examples agree, as when every answer is right: n examples then leave room for about 3 / n.

    recovered share = (arm - everywhere) / (bf16 - everywhere)

Where the interval of bf16 - everywhere holds 0 there is nothing to recover, and the share is None.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Cells = dict[tuple[str, int], dict[str, dict[str, list[float]]]]  # {(task, length): {arm: {measure: by example}}}
REFERENCE, WORST = "bf16", "everywhere"
FLOOR = 1e-7  # of what is left of a distribution: FP32 sums are not exact beyond


def divergence(ids: Array, logprobs: Array, other_ids: Array, other_logprobs: Array) -> Array:
    """KL(p || q) by row, in nats, from the best tokens of p [N, K] and of q [N, K], without duplicates in a row.

    Tokens that both lists have are compared one by one, all others as one; so it is a lower bound of the divergence of
    the whole vocabulary.
    """
    same = ids[:, :, None] == other_ids[:, None, :]
    common = same.any(2)
    logp = logprobs.astype(np.float64)
    logq = np.where(same, other_logprobs.astype(np.float64)[:, None, :], 0.0).sum(2)
    p, q = np.where(common, np.exp(logp), 0.0), np.where(common, np.exp(logq), 0.0)
    rest_p, rest_q = (np.maximum(1.0 - x.sum(1), FLOOR) for x in (p, q))
    total = (p * np.where(common, logp - logq, 0.0)).sum(1) + rest_p * np.log(rest_p / rest_q)
    distance: np.ndarray[Any, Any] = np.maximum(total, 0.0)
    return distance


def drawn_probability(logprobs: Array, temperature: float, top_p: float) -> Array:
    """By row, the probability that a draw at ``temperature`` from the best ``top_p`` finds the last token of
    ``logprobs`` [N, K]; what the list lacks has no share."""
    scaled = np.exp((logprobs - logprobs.max(1, keepdims=True)) / temperature)
    p = scaled / scaled.sum(1, keepdims=True)
    before = np.where(p > p[:, -1:], p, 0.0).sum(1)  # SGLang keeps a token while those before it have at most top_p
    order = -np.sort(-p, axis=1)
    kept = np.where(np.cumsum(order, axis=1) - order <= top_p, order, 0.0).sum(1)
    return np.where(before <= top_p, p[:, -1] / kept, 0.0)


def agreement(tokens: list[int], reference: list[int]) -> int:
    """Tokens before the first one that differs; all of the reference where none does."""
    for place, token in enumerate(reference):
        if place >= len(tokens) or tokens[place] != token:
            return place
    return len(reference)


def _interval(value: float, draws: Array) -> list[float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return [float(value), float(low), float(high)]


def analyse(
    cells: Cells, pairs: list[tuple[str, str]], ends: tuple[str, str], seed: int, draws: int
) -> dict[str, dict[str, Any]]:
    """``{group: {measure: {"value": {arm: [mean, low, high]}, "minus": {"a - b": ...}, "recovered": {arm: ...}}}}`` for
    the ``pairs`` (a, b) of arms; ``ends``: between which arms a share is recovered, the better one first."""
    first = next(iter(cells.values()))
    arms, measures = list(first), list(next(iter(first.values())))
    means, drawn = {}, {}
    for key, found in cells.items():
        values = np.array([[found[arm][measure] for measure in measures] for arm in arms], dtype=np.float64)
        n = values.shape[2]
        rng = np.random.default_rng([seed, zlib.crc32(f"{key}".encode())])
        flat = values.reshape(-1, n)
        parts = [
            rng.multinomial(n, np.full(n, 1 / n), size=min(500, draws - at)) @ flat.T for at in range(0, draws, 500)
        ]
        means[key] = values.mean(2)
        drawn[key] = (np.concatenate(parts) / n).reshape(draws, *values.shape[:2])
    groups: dict[str, list[tuple[str, int]]] = {f"{task} {length}": [(task, length)] for task, length in cells}
    groups |= {task: [key for key in cells if key[0] == task] for task, _ in cells}
    groups |= {"all": list(cells)}
    results: dict[str, dict[str, Any]] = {}
    for group, keys in groups.items():
        mean = np.mean([means[key] for key in keys], axis=0)
        draw = np.mean([drawn[key] for key in keys], axis=0)
        at = {arm: i for i, arm in enumerate(arms)}
        results[group] = {"examples": sum(len(cells[key][arms[0]][measures[0]]) for key in keys)}
        for m, measure in enumerate(measures):
            value = {arm: _interval(mean[i, m], draw[:, i, m]) for arm, i in at.items()}
            minus = {
                f"{a} - {b}": _interval(mean[at[a], m] - mean[at[b], m], draw[:, at[a], m] - draw[:, at[b], m])
                for a, b in pairs
            }
            results[group][measure] = {"value": value, "minus": minus, "recovered": {}}
            if not {*ends} <= at.keys():
                continue
            best, worst = at[ends[0]], at[ends[1]]
            lost = _interval(mean[best, m] - mean[worst, m], draw[:, best, m] - draw[:, worst, m])
            for arm, i in at.items():
                if arm in ends:
                    continue
                if lost[1] <= 0 <= lost[2]:
                    results[group][measure]["recovered"][arm] = None
                    continue
                lost_draws = draw[:, best, m] - draw[:, worst, m]
                safe = np.where(lost_draws == 0, np.nan, lost_draws)
                share = (draw[:, i, m] - draw[:, worst, m]) / safe
                share = share[np.isfinite(share)]
                results[group][measure]["recovered"][arm] = _interval((mean[i, m] - mean[worst, m]) / lost[0], share)
    return results
