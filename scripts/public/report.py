"""The summary of a public benchmark: scores with intervals, by group, against another arm, beside Mix-Quant's table.

A score is in percent.  The samples of an example are averaged first; ``+-`` is 1.96 standard errors over the examples.
It has no width where all examples agree; n examples then leave room for about 300 / n.  Against another arm the same is
done with the differences over the samples that both have.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from scripts.public.run import Record, Records
from scripts.public.server import Stop

ARMS = ("BF16", "NVFP4 everywhere", "Mix-Quant")
# arXiv 2605.20315, tables of haiquanlu.github.io/Mix-Quant, in the order of ARMS; no error bars were published.
MODELS = ("Qwen3-8B", "Qwen3.5-9B", "Gemma-4-26B-A4B", "Gemma-4-31B")
PUBLISHED = {
    "math500": [(93.73, 94.12, 94.40), (94.85, 93.46, 94.32), (95.86, 95.20, 95.40), (97.33, 97.75, 97.20)],
    "aime24": [(75.54, 66.53, 76.66), (68.89, 54.44, 70.33), (77.67, 75.33, 78.67), (92.22, 83.33, 93.33)],
    "aime25": [(67.77, 55.33, 66.66), (60.00, 40.00, 56.67), (65.33, 62.22, 69.67), (82.22, 80.00, 81.11)],
    "longbench_v2": [(39.86, 35.46, 38.60), (55.47, 50.40, 52.29), (53.83, 48.15, 51.57), (63.35, 58.55, 61.64)],
    "longmemeval": [(57.00, 49.82, 54.85), (86.27, 78.00, 84.27), (80.50, 62.42, 72.45), (90.80, 89.20, 90.40)],
}


def interval(by_example: dict[str, list[float]]) -> tuple[float, float | None]:
    """Mean in percent, and 1.96 standard errors where there are two examples at least."""
    means = [100 * sum(scores) / len(scores) for scores in by_example.values()]
    mean = sum(means) / len(means)
    if len(means) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in means) / (len(means) - 1)
    return mean, 1.96 * math.sqrt(variance / len(means))


def by_example(records: list[Record]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["id"], []).append(float(record["score"]))
    return found


def line(records: list[Record]) -> dict[str, Any]:
    """The figures of one group."""
    mean, half = interval(by_example(records))
    tokens = [record["output_tokens"] for record in records if record.get("output_tokens") is not None]
    return {
        "score": mean,
        "plus_minus": half,
        "examples": len({record["id"] for record in records}),
        "samples": len(records),
        "answered": sum(record["extracted"] not in (None, [], "") for record in records) / len(records),
        "cut_off": sum(record["finish"] == "length" for record in records) / len(records),
        "output_tokens": sum(tokens) / len(tokens) if tokens else None,
    }


def other_arm(folder: Path | None, name: str) -> Records | None:
    """What --against names; looked up before a run, not after it."""
    return Records(folder / f"{name}.jsonl", None) if folder else None


def summarise(name: str, records: list[Record], against: Records | None) -> dict[str, Any]:
    """All that ``show`` prints and the last line holds."""
    groups = sorted({group for record in records for group in record["groups"]})
    found = {"all": line(records)}
    found |= {group: line([record for record in records if group in record["groups"]]) for group in groups}
    result: dict[str, Any] = {"groups": found, "published": dict(zip(MODELS, PUBLISHED.get(name, []), strict=False))}
    if against:
        result["against"] = difference(records, against)
    return result


def difference(records: list[Record], other: Records) -> dict[str, Any]:
    """This run minus the other one, over the samples of the same prompts that both have."""
    pairs: dict[str, list[float]] = {}
    tokens = []
    for record in records:
        twin = other.by_key.get((record["id"], record["seed"]))
        if twin is None or twin["prompt"] != record["prompt"] or twin.get("score") is None:
            continue
        pairs.setdefault(record["id"], []).append(float(record["score"]) - float(twin["score"]))
        if record.get("output_tokens") and twin.get("output_tokens"):
            tokens.append(record["output_tokens"] - twin["output_tokens"])
    if not pairs:
        raise Stop(f"{other.file} and this run have no example in common")
    mean, half = interval(pairs)
    more = sum(tokens) / len(tokens) if tokens else None
    found = {"file": str(other.file), "difference": mean, "plus_minus": half, "examples": len(pairs), "tokens": more}
    return {**found, "identity": other.identity}


def settings_of(identity: dict[str, Any]) -> dict[str, Any]:
    """All that decides the answers but the arm, by name; nested ones as ``sampling.top_p``."""
    found: dict[str, Any] = {}
    for name, value in identity.items():
        if isinstance(value, dict) and name != "server":
            found |= {f"{name}.{key}": one for key, one in value.items()}
        elif name not in ("server", "benchmark"):
            found[name] = value
    return found


def unlike(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The settings in which two arms differ, with what the other one has: a difference is then not the arms' alone."""
    mine, theirs = (settings_of(json.loads(json.dumps(one))) for one in (identity, other))
    return [f"{name} {json.dumps(theirs[name])}" for name in mine if name in theirs and theirs[name] != mine[name]]


def plus_minus(mean: float, half: float | None) -> str:
    return f"{mean:.2f}" + ("" if half is None else f" +- {half:.2f}")


def describe(server: dict[str, Any]) -> str:
    """The arm: what the server says of its precisions."""
    state = server.get("mixquant") or {}
    if state:
        kernels = state.get("kernel") or {}
        phases = []
        for phase, words in state["precision"].items():  # nvfp4+fp8, where rules give layers another
            each = (f"{name} {kernels.get(name, '')}".strip() for name in words.split("+"))
            phases.append(f"{phase} {' + '.join(each)}")
        return f"mixquant {state['recipe']} ({', '.join(phases)})"
    if not server:
        return "unknown server"
    return f"SGLang {server.get('version')}, quantization {server.get('quantization') or 'none'}"


def show(name: str, result: dict[str, Any], identity: dict[str, Any], how: str) -> None:
    """The tables for people."""
    print(f"\n{name}: {identity['model']}, {describe(identity['server'])}; {how}\n")
    print("| | score | examples | samples | answered | cut off | output tokens |\n|---|---|---|---|---|---|---|")
    for group, row in result["groups"].items():
        score = plus_minus(row["score"], row["plus_minus"])
        tokens = "-" if row["output_tokens"] is None else f"{row['output_tokens']:.1f}"
        rest = f"{row['answered']:.1%} | {row['cut_off']:.1%} | {tokens}"
        print(f"| {group} | {score} | {row['examples']} | {row['samples']} | {rest} |")
    if other := result.get("against"):
        score = plus_minus(other["difference"], other["plus_minus"])
        more = "" if other["tokens"] is None else f", output tokens {other['tokens']:+.1f}"
        print(f"\nminus {other['file']}, {other['examples']} examples in common: {score}{more}")
        if unequal := unlike(identity, other["identity"]):
            print(f"other settings there, so this is not the arms' difference alone: {', '.join(unequal)}")
    if rows := result["published"]:
        print(f"\n| published (arXiv 2605.20315) | {' | '.join(ARMS)} |\n|---|---|---|---|")
        served = identity["model"].lower()
        known = [model for model in rows if model.lower() in served]
        for model in known or rows:
            print(f"| {model} | {' | '.join(f'{score:.2f}' for score in rows[model])} |")
    else:
        print("\nMix-Quant published no figures of this benchmark.")


def last_line(results: dict[str, Any], identity: dict[str, Any], files: list[Path]) -> None:
    head = {name: identity[name] for name in ("model", "server", "sampling")}
    print("\n" + json.dumps({**head, "results": results, "files": [str(file) for file in files]}))
