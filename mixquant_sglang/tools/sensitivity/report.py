"""What ``mixquant sensitivity`` prints: a recipe with its evidence as comments above it, so that all is one file.

Rules for the kept linears come first, since the first match wins, then those of the recipe that it began with. Linears
kept in the same layers share a rule; a rule for all that would be low precision names no layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace

from mixquant_sglang.recipe import REGEX, LayerRule, Recipe
from mixquant_sglang.tools.sensitivity.choice import Measured, Result

WORSE = (
    "mixquant sensitivity: the recipe that came out does more to the answers than the one that it began with: what the "
    "linears do does not add up here. Keep the one you had, or try more --samples or another --budget"
)


def as_yaml(result: Result) -> str:
    """The recipe alone."""
    recipe, every = result.recipe, len(result.kept) == len(result.groups)
    rules = (*(LayerRule(match, "bf16", None, "") for match in patterns(result)), *recipe.layers)
    return replace(
        recipe,
        description=f"{recipe.name}, {len(result.kept)} of {len(result.groups)} {what(result)} kept in BF16 by "
        "sensitivity",
        prefill="bf16" if every else result.prefill,
        layers=() if every else rules,
    ).to_yaml()


def patterns(result: Result) -> list[str]:
    """Regular expressions for the kept linears, and for no other that would be low precision."""
    kinds: dict[tuple[int, ...], list[str]] = {}
    for kind, of_kind in _by_kind(result).items():
        layers = tuple(one.group.layer for one in of_kind if one.group.name in result.kept)
        if layers:
            kinds.setdefault(() if len(layers) == len(of_kind) else layers, []).append(kind)
    made = []
    for layers, names in kinds.items():
        where = rf"layers\.{_either([str(layer) for layer in layers])}" if layers else r"layers\.\d+"
        made.append(rf"{REGEX}model\.{where}\.{_either([re.escape(name) for name in names])}$")
    return made


def comments(result: Result) -> str:
    """The evidence; every line begins with ``#``."""
    tokens, answers = result.tokens
    before, after = result.runs["recipe"], result.runs["result"]
    lines = [
        f"mixquant sensitivity: {result.model}, recipe {result.recipe.name} (prefill {result.prefill}), "
        f"{tokens} tokens, {answers} of them as answers in BF16" + _protected(result.recipe),
        "",
        f"KL(BF16 || emulated) in nats per token, each {what(result, 1)} alone in low precision. answer: over the BF16 "
        "rows at the",
        "end of the samples, which decides; prompt: over the low-precision rows before. ms: prefill time that low",
        f"precision gains, predicted for {result.gpu}, {result.input_len} tokens.",
        "",
        f"{'kind':<20}  kept in BF16  sum of answer KL  sum of prompt KL        ms",
    ]
    for kind, of_kind in _by_kind(result).items():
        kept = sum(one.group.name in result.kept for one in of_kind)
        answer, prompt = sum(one.kl.answer for one in of_kind), sum(one.kl.prompt for one in of_kind)
        gain = sum(one.gain_ms for one in of_kind)
        lines.append(f"{kind:<20}  {f'{kept} of {len(of_kind)}':>12}  {answer:16.3e}  {prompt:16.3e}  {gain:8.3f}")
    width = max(len(one.group.name) for one in result.groups)
    lines += ["", f"{'linear':<{width}}  precision  answer KL  prompt KL        ms  KL per ms"]
    for one in result.groups:
        worth = f"{one.kl.answer / one.gain_ms:9.2e}" if one.gain_ms > 0 else f"{'no gain':>9}"
        kept_mark = "  kept in BF16" if one.group.name in result.kept else ""
        kept_mark = "  as small as noise" if 0 < one.kl.answer <= result.floor and not kept_mark else kept_mark
        lines.append(
            f"{one.group.name:<{width}}  {one.group.precision:<9}  {one.kl.answer:9.2e}  {one.kl.prompt:9.2e}  "
            f"{one.gain_ms:8.4f}  {worth}{kept_mark}"
        )
    lines += ["", "run as a whole           answer KL  prompt KL  prefill ms  speed-up"]
    for title, name in (("BF16 (check: 0)", "bf16"), ("recipe as it was", "recipe"), ("recipe below", "result")):
        run = result.runs[name]
        lines.append(
            f"{title:<23}  {run.kl.answer:9.2e}  {run.kl.prompt:9.2e}  {run.prefill_ms:10.3f}  {run.speedup:7.3f}x"
        )
    noise = result.noise
    lines.append(f"{'rounding to BF16 alone':<23}  {noise.answer:9.2e}  {noise.prompt:9.2e}")
    share = result.given_back_ms / result.gain_ms
    lines += [
        "",
        f"{len(result.kept)} of {len(result.groups)} {what(result)} are kept in BF16. That gives back "
        f"{result.given_back_ms:.3f} of {result.gain_ms:.3f} ms ({share:.2%}; budget {result.budget:.2%}).",
        f"Answer KL {before.kl.answer:.2e} -> {after.kl.answer:.2e}, measured in emulation; times are predictions.",
        f"All else was computed in {result.compute}. An answer KL up to {result.floor:.1e} may be BF16 rounding alone:",
        "nothing is kept in BF16 for that.",
    ]
    if result.worse:
        lines += ["", "WORSE: " + WORSE.partition(": ")[2] + "."]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def what(result: Result, many: int = 2) -> str:
    """What the groups are; the experts of a layer are one group."""
    linears, layers = ("linears", "layers") if many > 1 else ("linear", "layer")
    return linears if all(one.group.members for one in result.groups) else f"{linears} and {layers} of experts"


def _protected(recipe: Recipe) -> str:
    if not recipe.protect_last_prompt_token:
        return ", but for the first of each sample: protect is off"
    before = recipe.protected_tail - 1
    return f", and the {before} before them: last_prompt_tokens" if before else ""


def as_json(result: Result) -> str:
    """One line."""
    values = {key: value for key, value in vars(result).items() if key not in ("recipe", "groups", "kept", "runs")}
    values["recipe"], values["result"] = result.recipe.name, as_yaml(result)
    values["groups"] = [
        {"name": one.group.name, "precision": one.group.precision, **asdict(one.kl), "gain_ms": one.gain_ms}
        | {"kept": one.group.name in result.kept}
        for one in result.groups
    ]
    values["runs"] = {name: asdict(one) for name, one in result.runs.items()}
    values |= {"noise": asdict(result.noise), "floor": result.floor, "worse": result.worse}
    return json.dumps(values)


def _by_kind(result: Result) -> dict[str, list[Measured]]:
    kinds: dict[str, list[Measured]] = {}
    for one in result.groups:
        kinds.setdefault(one.group.kind, []).append(one)
    return kinds


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"({'|'.join(words)})"
