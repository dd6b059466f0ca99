"""Which layer rule of a recipe applies to which module.

A rule that starts with ``re:`` is a regular expression that must match from the start of the module name (``re.match``,
as compressed-tensors has it; end it in ``$`` to match the whole name). Any other rule is one exact module name. The
first rule that matches wins. A rule that matches nothing is refused, unless it says ``optional: true``.

SGLang fuses checkpoint layers: ``qkv_proj`` holds ``q_proj``, ``k_proj`` and ``v_proj`` in one GEMM, which has one
precision. A rule may name the fused module or its shards. A rule matches a shard if it matches the shard's name or the
fused name; each shard takes its first rule, and shards that come out different are refused: there is no half-low GEMM.

The experts of a layer are one module of SGLang, ``model.layers.0.mlp.experts``, with one precision. A rule matches it
by that name, or by the names of all linears of all experts (``re:.*\\.experts\\.\\d+\\.``). One that matches only some
of them, such as ``experts.3.up_proj`` or ``re:.*down_proj``, is refused, unless an earlier one has the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.modules import EXPERT_LEAVES, is_experts
from mixquant_sglang.recipe.schema import REGEX, LayerRule
from mixquant_sglang.recipe.text import did_you_mean, nearest, show

_EXPERTS = 512  # numbers that are tried; a rule for a higher one alone matches nothing, which is refused as well


class RuleMatcher:
    """Answers for one recipe and one model.

    ``fused``: last path component of a fused module -> those of its shards, e.g. ``{"qkv_proj": ["q_proj", ...]}``
    (``packed_modules_mapping`` in SGLang). Asking has no effect on later answers; it is only remembered which rules
    matched something, so that a rule that never does can be reported.
    """

    def __init__(self, rules: Sequence[LayerRule], fused: Mapping[str, Sequence[str]]) -> None:
        self._rules = tuple(rules)
        self._fused = {name: tuple(shards) for name, shards in fused.items()}
        self._tests = [_test(rule) for rule in self._rules]
        self._matched: set[int] = set()

    def precisions(self, name: str, default_prefill: str, default_decode: str) -> tuple[str, str]:
        """(prefill, decode) of a module; MixQuantError if the shards of a fused module disagree, or if a rule is for
        some of a layer's experts."""
        if is_experts(name):
            return self._result(self._of_experts(name), default_prefill, default_decode)
        shards = self.shards(name)
        by_fused = self._matching(name)
        first = {shard: min(by_fused | self._matching(shard), default=None) for shard in shards or (name,)}
        results = {shard: self._result(rule, default_prefill, default_decode) for shard, rule in first.items()}
        if len(set(results.values())) > 1:
            each = ", ".join(
                f"{shard.rpartition('.')[2]} prefill={prefill} decode={decode} ({self._where(first[shard])})"
                for shard, (prefill, decode) in results.items()
            )
            where = self._where(min(rule for rule in first.values() if rule is not None))
            raise MixQuantError(
                f"{where} layers: the shards of the fused layer {name!r} disagree: {each}; "
                f"allowed: the same precisions for every shard, or one rule for {name.rpartition('.')[2]}"
            )
        return next(iter(results.values()))

    def asking(self, name: str) -> tuple[LayerRule, ...]:
        """The rules that decided on a module, and are not optional, where they ask for low precision."""
        if is_experts(name):
            first = {self._of_experts(name)}
        else:
            by_fused = self._matching(name)
            first = {min(by_fused | self._matching(shard), default=None) for shard in self.shards(name) or (name,)}
        rules = [self._rules[rule] for rule in sorted(rule for rule in first if rule is not None)]
        return tuple(r for r in rules if not r.optional and {r.prefill, r.decode} - {None, "bf16"})

    def unmatched(self) -> tuple[LayerRule, ...]:
        """The rules that matched no module asked so far; one that matched and lost to an earlier rule is not here."""
        return tuple(rule for i, rule in enumerate(self._rules) if i not in self._matched)

    def check_all_matched(self, known_names: Iterable[str]) -> None:
        """Refuse a rule, unless it is optional, that matched no module asked so far; ``known_names`` are the model's,
        for the suggestion."""
        missing = [rule for rule in self.unmatched() if not rule.optional]
        if not missing:
            return
        rule, *others = missing
        known = sorted({part for name in known_names for part in (name, *self.shards(name))})
        also = "".join(f", nor does {show(other.match)} ({other.where})" for other in others)
        raise MixQuantError(f"{rule.where} layers.match: {show(rule.match)} matches no layer{also}{_hint(rule, known)}")

    def shards(self, name: str) -> tuple[str, ...]:
        """The checkpoint's modules that the fused module ``name`` holds, in order; none for any other module."""
        parent, dot, leaf = name.rpartition(".")
        return tuple(f"{parent}{dot}{shard}" for shard in self._fused.get(leaf, ()))

    def _of_experts(self, layer: str) -> int | None:
        """The first rule that matches a MoE layer."""
        whole = self._matching(layer)
        for i, (rule, test) in enumerate(zip(self._rules, self._tests, strict=True)):
            if i in whole:
                return i
            linears = [
                [test(f"{layer}.{e}.{leaf}") for e in range(_EXPERTS) for leaf in each] for each in EXPERT_LEAVES
            ]
            if any(map(any, linears)):
                self._matched.add(i)
                if any(map(all, linears)):
                    return i
                raise MixQuantError(
                    f"{rule.where} layers.match: {show(rule.match)} matches some linears of the experts of {layer}, "
                    f"which run in one precision; allowed: {layer!r}, {REGEX}.*\\.experts$, or a rule that matches none"
                )
        return None

    def _matching(self, name: str) -> set[int]:
        """Every rule that matches this very name, by its place; remembers them."""
        matching = {i for i, test in enumerate(self._tests) if test(name)}
        self._matched |= matching
        return matching

    def _result(self, rule: int | None, default_prefill: str, default_decode: str) -> tuple[str, str]:
        if rule is None:
            return default_prefill, default_decode
        return self._rules[rule].prefill or default_prefill, self._rules[rule].decode or default_decode

    def _where(self, rule: int | None) -> str:
        return "no rule" if rule is None else self._rules[rule].where


def _test(rule: LayerRule) -> Callable[[str], object]:
    if rule.match.startswith(REGEX):
        return re.compile(rule.match.removeprefix(REGEX)).match
    return partial(str.__eq__, rule.match)


def _hint(rule: LayerRule, known: Sequence[str]) -> str:
    """The modules that the rule may have meant: the nearest names, else one for each of the nearest last components."""
    if not known:
        return "; the model has no layer that a rule can name"
    is_regex = rule.match.startswith(REGEX)
    word = rule.match.removeprefix(REGEX)
    if is_regex:  # read it as a name: escapes stand for themselves, operators go
        word = re.sub(r"\\(.)|\.?[*+?]|[\^$|(){}\[\]]", r"\1", word)
    example = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = nearest(word, known, most=3)
    near = near or [example[leaf] for leaf in nearest(word.rpartition(".")[2], example, most=3)]
    if not is_regex and re.search(r"[*+?^$|(){}\[\]\\]", word):
        return f"; a regular expression starts with {REGEX}{did_you_mean(near)}"
    return did_you_mean(near) or f"; allowed: a module name like {known[0]!r}, or {REGEX} and a regular expression"
