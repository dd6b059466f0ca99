"""Layer rules: which one wins, what fused layers make of them, and which ones matched nothing."""

from __future__ import annotations

import pytest

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import LayerRule
from mixquant_sglang.recipe.matching import RuleMatcher

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
QKV = "model.layers.0.self_attn.qkv_proj"
O_PROJ = "model.layers.0.self_attn.o_proj"
DOWN = "model.layers.0.mlp.down_proj"
NAMES = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
NAMES += [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("self_attn.o_proj", "mlp.down_proj")]

Rule = tuple[str, str | None, str | None]


def matcher(*rules: Rule, fused: dict[str, list[str]] = FUSED) -> RuleMatcher:
    """Rule i stands in line i + 1."""
    made = [LayerRule(match, prefill, decode, f"r.yaml:{i}") for i, (match, prefill, decode) in enumerate(rules, 1)]
    return RuleMatcher(made, fused)


def ask(asked: RuleMatcher, name: str) -> tuple[str, str]:
    return asked.precisions(name, "nvfp4", "bf16")


def refusal(asked: RuleMatcher, name: str) -> str:
    with pytest.raises(MixQuantError) as caught:
        ask(asked, name)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_no_rules() -> None:
    assert ask(matcher(), DOWN) == ("nvfp4", "bf16")
    assert ask(matcher(), QKV) == ("nvfp4", "bf16")


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (DOWN, True),
        (DOWN + "x", False),
        ("down_proj", False),  # an exact name is the whole name
        ("model.layers.0.mlp", False),
        ("model.layers.0.mlp.down.proj", False),  # and no regular expression
        ("re:down_proj", False),  # from the start of the name
        (r"re:.*down_proj", True),
        (r"re:.*\.mlp\.", True),  # but not to its end
        (r"re:.*\.mlp$", False),
        (r"re:model\.layers\.(0|1)\.mlp\.down_proj$", True),
        (r"re:model\.layers\.[12]\.", False),
        (r"re:(?!.*o_proj)", True),
        (r"re:.*DOWN_PROJ", False),
    ],
)
def test_what_a_pattern_matches(pattern: str, matches: bool) -> None:
    asked = matcher((pattern, "fp8", "fp8"))
    assert ask(asked, DOWN) == (("fp8", "fp8") if matches else ("nvfp4", "bf16"))
    assert bool(asked.unmatched()) is not matches


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [("fp8", None, ("fp8", "bf16")), (None, "fp8", ("nvfp4", "fp8")), ("bf16", "nvfp4", ("bf16", "nvfp4"))],
)
def test_a_phase_left_out_keeps_its_default(prefill: str | None, decode: str | None, expected: tuple[str, str]) -> None:
    assert ask(matcher((DOWN, prefill, decode)), DOWN) == expected


def test_the_first_match_wins_and_is_not_completed_by_a_later_one() -> None:
    asked = matcher((DOWN, "fp8", None), ("re:.*", "bf16", "nvfp4"))
    assert ask(asked, DOWN) == ("fp8", "bf16")
    assert ask(asked, O_PROJ) == ("bf16", "nvfp4")


# Fused layers


@pytest.mark.parametrize(
    "pattern", [QKV, r"re:.*qkv_proj", r"re:.*\.[qkv]_proj$", r"re:.*self_attn", r"re:.*(q|k|v)_proj"]
)
def test_a_fused_layer_by_its_name_or_by_all_its_shards(pattern: str) -> None:
    assert ask(matcher((pattern, "bf16", None)), QKV) == ("bf16", "bf16")


def test_all_shards_by_several_rules() -> None:
    prefix = "model.layers.0.self_attn."
    asked = matcher(*((f"{prefix}{shard}", "fp8", None) for shard in FUSED["qkv_proj"]))
    assert ask(asked, QKV) == ("fp8", "bf16")
    assert asked.unmatched() == ()


def test_different_rules_with_one_result_agree() -> None:
    # q_proj by its rule, k_proj and v_proj by the default: the same precisions.
    assert ask(matcher((r"re:.*q_proj", "nvfp4", None)), QKV) == ("nvfp4", "bf16")
    assert ask(matcher((r"re:.*\.q_proj", "fp8", None), (r"re:.*self_attn", "fp8", "bf16")), QKV) == ("fp8", "bf16")


def test_shards_that_disagree_with_the_default() -> None:
    message = refusal(matcher((DOWN, "bf16", None), (r"re:.*\.q_proj", "bf16", None)), QKV)
    assert message == (
        f"r.yaml:2 layers: the shards of the fused layer '{QKV}' disagree: "
        "q_proj prefill=bf16 decode=bf16 (r.yaml:2), k_proj prefill=nvfp4 decode=bf16 (no rule), "
        "v_proj prefill=nvfp4 decode=bf16 (no rule); allowed: the same precisions for every shard, "
        "or one rule for qkv_proj"
    )


def test_shards_that_disagree_with_each_other() -> None:
    message = refusal(matcher((r"re:.*\.[kv]_proj", None, "fp8"), (r"re:.*\.q_proj", "bf16", None)), QKV)
    assert message.startswith("r.yaml:1 layers: ")
    for part in ("q_proj prefill=bf16 decode=bf16 (r.yaml:2)", "k_proj prefill=nvfp4 decode=fp8 (r.yaml:1)"):
        assert part in message


def test_an_earlier_rule_for_the_fused_name_beats_a_later_one_for_a_shard() -> None:
    assert ask(matcher((r"re:.*qkv_proj", "fp8", None), (r"re:.*\.q_proj", "bf16", None)), QKV) == ("fp8", "bf16")


def test_an_earlier_rule_for_one_shard_beats_a_later_one_for_the_fused_name() -> None:
    message = refusal(matcher((r"re:.*\.q_proj", "bf16", None), (r"re:.*qkv_proj", "fp8", None)), QKV)
    assert "q_proj prefill=bf16 decode=bf16 (r.yaml:1), k_proj prefill=fp8 decode=bf16 (r.yaml:2)" in message


def test_the_model_decides_what_is_fused() -> None:
    rule: Rule = (r"re:.*\.q_proj", "bf16", None)
    assert ask(matcher(rule, fused={}), QKV) == ("nvfp4", "bf16")
    assert ask(matcher(rule, fused={}), QKV.replace("qkv_proj", "q_proj")) == ("bf16", "bf16")
    assert ask(matcher((QKV, "bf16", None), fused={"qkv_proj": []}), QKV) == ("bf16", "bf16")


def test_a_fused_layer_at_the_root() -> None:
    asked = matcher(("gate_proj", "fp8", None), ("up_proj", "fp8", None))
    assert ask(asked, "gate_up_proj") == ("fp8", "bf16")
    assert ask(asked, "mlp.gate_up_proj") == ("nvfp4", "bf16")


# Experts

EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    "pattern",
    [
        EXPERTS,
        r"re:.*\.experts$",
        r"re:.*\.experts",
        r"re:.*\.mlp\.",
        r"re:.*\.experts\.\d+\.",
        r"re:.*\.experts\.[0-9]+\.(gate|up|down)_proj$",
        r"re:.*\.experts\.\d+\.w[123]$",
        r"re:.*\.(gate|up|down)_proj$",
    ],
)
def test_a_rule_for_experts_is_for_all_of_a_layer(pattern: str) -> None:
    asked = matcher((pattern, "fp8", None))
    assert ask(asked, EXPERTS) == ("fp8", "bf16")
    assert [rule.match for rule in asked.asking(EXPERTS)] == [pattern]
    assert asked.unmatched() == ()
    assert ask(asked, "model.layers.0.self_attn.o_proj") == ("nvfp4", "bf16")


@pytest.mark.parametrize(
    "pattern",
    [
        f"{EXPERTS}.3.gate_proj",
        r"re:.*\.experts\.3\.",
        r"re:.*\.experts\.[0-9]\.",
        r"re:.*\.experts\.\d+\.down_proj",
        r"re:.*down_proj",
        r"re:.*\.experts\.\d+\.w2$",
        r"re:.*\.experts\.511\.w2$",
    ],
)
def test_a_rule_for_some_experts_is_refused(pattern: str) -> None:
    message = refusal(matcher(("re:.*o_proj", "fp8", None), (pattern, "bf16", None)), EXPERTS)
    assert message == (
        f"r.yaml:2 layers.match: {pattern!r} matches some linears of the experts of {EXPERTS}, which run in one "
        rf"precision; allowed: '{EXPERTS}', re:.*\.experts$, or a rule that matches none"
    ).replace("\\\\", "\\")


def test_an_earlier_rule_for_the_experts_beats_one_for_some() -> None:
    asked = matcher((r"re:.*\.experts$", "fp8", None), (r"re:.*down_proj", "bf16", None))
    assert ask(asked, EXPERTS) == ("fp8", "bf16")
    assert ask(asked, DOWN) == ("bf16", "bf16")
    assert ask(asked, "model.layers.0.mlp.shared_expert.down_proj") == ("bf16", "bf16")


def test_shared_experts_are_linears() -> None:
    asked = matcher((r"re:.*\.shared_experts\.", "fp8", None))
    assert ask(asked, EXPERTS) == ("nvfp4", "bf16")
    assert ask(asked, "model.layers.0.mlp.shared_experts.gate_up_proj") == ("fp8", "bf16")
    assert asked.asking(EXPERTS) == ()


# Rules that match nothing


def test_a_rule_that_lost_still_matched() -> None:
    asked = matcher(
        ("re:.*", "fp8", None), (DOWN, "bf16", None), ("re:.*k_proj", "bf16", None), ("lm_head", "bf16", None)
    )
    assert [rule.where for rule in asked.unmatched()] == ["r.yaml:1", "r.yaml:2", "r.yaml:3", "r.yaml:4"]
    ask(asked, DOWN)
    ask(asked, QKV)
    assert [rule.where for rule in asked.unmatched()] == ["r.yaml:4"]


def test_asking_twice_or_for_a_dummy_changes_no_answer() -> None:
    asked = matcher((r"re:.*down_proj", "bf16", None), (r"re:.*\.q_proj", "bf16", None))
    before = [ask(asked, DOWN), ask(asked, O_PROJ)]
    assert ask(asked, "dummy") == ask(asked, "") == ("nvfp4", "bf16")
    first, second = refusal(asked, QKV), refusal(asked, QKV)
    assert first == second
    assert [ask(asked, DOWN), ask(asked, O_PROJ)] == before
    assert asked.precisions(DOWN, "fp8", "nvfp4") == ("bf16", "nvfp4")  # the defaults are the question's, not kept


def test_all_matched() -> None:
    asked = matcher((r"re:.*down_proj", "bf16", None))
    ask(asked, DOWN)
    asked.check_all_matched(NAMES)
    matcher().check_all_matched([])


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("model.layers.1.mlp.down_prj", ["did you mean 'model.layers.1.mlp.down_proj'"]),
        ("model.layers.1.self_attn.kproj", ["did you mean 'model.layers.1.self_attn.k_proj'"]),
        ("model.layers.1.self_attn.qkvproj", ["did you mean 'model.layers.1.self_attn.qkv_proj'"]),
        ("down_proj", ["did you mean 'model.layers.0.mlp.down_proj'"]),
        (r"re:.*\.dwn_proj$", ["did you mean 'model.layers.0.mlp.down_proj'"]),
        (r"re:model\.layers\.[0-9]+\.mlp\.down_prj", ["mlp.down_proj'"]),
        (r".*\.down_proj", ["; a regular expression starts with re:; did you mean 'model.layers.0.mlp.down_proj'"]),
        (r"re:zzz", ["allowed: a module name like 'model.layers.0.mlp.down_proj', or re: and a regular expression"]),
    ],
)
def test_an_unmatched_rule(pattern: str, parts: list[str]) -> None:
    asked = matcher((r"re:.*o_proj", "bf16", None), (pattern, "bf16", None))
    for name in NAMES:
        ask(asked, name)
    with pytest.raises(MixQuantError) as caught:
        asked.check_all_matched(iter(NAMES))
    message = str(caught.value)
    assert message.startswith(f"r.yaml:2 layers.match: '{pattern}' matches no layer; ")
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


def test_an_optional_rule_may_match_nothing() -> None:
    optional = LayerRule("re:.*dawn_proj", "bf16", None, "r.yaml:1", optional=True)
    asked = RuleMatcher([optional, LayerRule(DOWN, "fp8", None, "r.yaml:2")], FUSED)
    assert ask(asked, DOWN) == ("fp8", "bf16")
    asked.check_all_matched([DOWN])
    assert asked.unmatched() == (optional,)
    asked = RuleMatcher([optional, LayerRule("a.b", "fp8", None, "r.yaml:2")], FUSED)
    ask(asked, DOWN)
    with pytest.raises(MixQuantError, match=r"^r.yaml:2 layers.match: 'a.b' matches no layer; allowed"):
        asked.check_all_matched([DOWN])


def test_an_optional_rule_that_matches_is_as_any_other() -> None:
    asked = RuleMatcher([LayerRule("re:.*o_proj", "bf16", None, "r.yaml:1", optional=True)], FUSED)
    assert (ask(asked, O_PROJ), asked.unmatched()) == (("bf16", "bf16"), ())


def test_several_unmatched_rules_and_a_model_without_layers() -> None:
    asked = matcher(("a.b", "bf16", None), ("c.d", "bf16", None), ("e.f", "bf16", None))
    with pytest.raises(MixQuantError) as caught:
        asked.check_all_matched([])
    assert str(caught.value) == (
        "r.yaml:1 layers.match: 'a.b' matches no layer, nor does 'c.d' (r.yaml:2), nor does 'e.f' (r.yaml:3); "
        "the model has no layer that a rule can name"
    )
