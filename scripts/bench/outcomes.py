"""What came of the requests of a replayed trace: percentiles, attainment of limits, what was lost; and the table."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field

from scripts.bench.client import Answer, percentile

Measures = dict[str, float | None]
UNITS = {
    **{f"ttft_p{p}_ms": f"ttft p{p}" for p in (50, 95, 99)},
    **{f"itl_p{p}_ms": f"itl p{p}" for p in (50, 95, 99)},
    **{f"latency_p{p}_ms": f"latency p{p}" for p in (50, 95)},
    "requests_per_s": "req/s",
    "output_tokens_per_s": "tok/s",
    "output_tokens_per_s_per_gpu": "tok/s/GPU",
    "cache_hit_rate": "cached",
    "slo_attainment": "slo",
    "slo_ttft_attainment": "slo, ttft",
    "slo_itl_attainment": "slo, itl",
    "goodput_per_s": "goodput",
    "late_p99_ms": "late p99",
}
SHARES = ("cache_hit_rate", "slo_attainment", "slo_ttft_attainment", "slo_itl_attainment")
RATES = ("requests_per_s", "output_tokens_per_s", "output_tokens_per_s_per_gpu", "goodput_per_s")


@dataclass(frozen=True)
class Outcome:
    """Of one request.  ``late``: seconds.  ``answer`` None: ``why`` says what came instead."""

    late: float
    answer: Answer | None = None
    refused: bool = False
    why: str = ""

    def itl(self) -> list[float]:
        """Milliseconds, a token each; none of the first."""
        gaps = self.answer.gaps if self.answer else []
        return [1e3 * gap / tokens for gap, tokens in gaps for _ in range(tokens)]


@dataclass(frozen=True)
class Slo:
    """Limits in ms, or None."""

    ttft: float | None = None
    itl: float | None = None

    def met(self, one: Outcome) -> tuple[bool, bool]:
        """(ttft, itl) of one request; neither where it was not answered.  One token has no itl to be missed."""
        if one.answer is None:
            return False, False
        itl = one.itl()
        ttft_met = self.ttft is None or 1e3 * one.answer.ttft <= self.ttft
        return ttft_met, self.itl is None or not itl or statistics.fmean(itl) <= self.itl


@dataclass
class Level:
    """One arm at one rate: measures and outcomes of each round."""

    rounds: list[Measures] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def lost(self) -> dict[str, int]:
        refused = sum(one.refused for one in self.outcomes)
        return {"refused": refused, "failed": sum(one.answer is None for one in self.outcomes) - refused}

    def reasons(self, most: int = 5) -> dict[str, int]:
        found = Counter(one.why for one in self.outcomes if one.answer is None)
        told = dict(found.most_common(most))
        rest = found.total() - sum(told.values())
        return told | ({"other reasons": rest} if rest else {})


def summarise(outcomes: list[Outcome], wall_s: float, slo: Slo, gpus: int = 1) -> Measures:
    """None where nothing is there to be measured; attainment and goodput only where ``slo`` has limits."""
    answers = [one.answer for one in outcomes if one.answer]
    met = [slo.met(one) for one in outcomes]
    times = {
        "ttft": [1e3 * one.ttft for one in answers],
        "itl": [ms for one in outcomes for ms in one.itl()],
        "latency": [1e3 * one.latency for one in answers],
        "late": [1e3 * one.late for one in outcomes],
    }
    found: Measures = {}
    for key in UNITS:
        name, _, rank = key.removesuffix("_ms").partition("_p")
        if name in times and rank.isdigit():
            found[key] = percentile(times[name], int(rank)) if times[name] else None
    tokens = sum(len(one.ids) for one in answers)
    prompt_tokens = sum(one.prompt_tokens for one in answers)
    found["requests_per_s"] = len(answers) / wall_s
    found["output_tokens_per_s"] = tokens / wall_s
    found["output_tokens_per_s_per_gpu"] = tokens / wall_s / gpus
    found["cache_hit_rate"] = sum(one.cached_tokens for one in answers) / prompt_tokens if prompt_tokens else None
    if slo != Slo():
        both = sum(a and b for a, b in met)
        found["slo_attainment"] = both / len(outcomes)
        found["slo_ttft_attainment"] = sum(a for a, _ in met) / len(outcomes)
        found["slo_itl_attainment"] = sum(b for _, b in met) / len(outcomes)
        found["goodput_per_s"] = both / wall_s
    return {key: found[key] for key in UNITS if key in found}


def medians(rounds: list[Measures]) -> Measures:
    columns = {key: [one[key] for one in rounds] for key in rounds[0]}
    known = {key: [value for value in column if value is not None] for key, column in columns.items()}
    return {key: statistics.median(values) if values else None for key, values in known.items()}


def table(levels: dict[str, Level]) -> str:
    """Measures by arms; in brackets how many times as good as the first arm."""
    results = {name: medians(level.rounds) for name, level in levels.items()}
    first = next(iter(results.values()))

    def cell(key: str, value: float | None, base: float | None) -> str:
        if value is None:
            return "-"
        if key in SHARES:
            return f"{value:.1%}"
        good, bad = (value, base) if key in RATES else (base, value)
        if key == "late_p99_ms" or not good or not bad:
            return f"{value:.2f}"
        return f"{value:.2f} ({good / bad:.3f}x)"

    lines = [f"{'(ms)':<12}" + "".join(f"{name:>24}" for name in results)]
    for key in first:
        cells = (cell(key, found[key], first[key]) for found in results.values())
        lines.append(f"{UNITS[key]:<12}" + "".join(f"{one:>24}" for one in cells))
    for what in ("refused", "failed"):
        counts = (f"{level.lost()[what]} of {len(level.outcomes)}" for level in levels.values())
        lines.append(f"{what:<12}" + "".join(f"{one:>24}" for one in counts))
    for name, level in levels.items():
        lines += [f"  {name}: {n}x {why}" for why, n in level.reasons().items()]
    return "\n".join(lines)
