"""What a decode server keeps of a recipe, and which prefill servers it takes keys and values from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.recipe import pairs, policy
from mixquant_sglang.recipe.fingerprint import asked_digest, fingerprint
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED
from mixquant_sglang.recipe.select import Device, select

CPU = Device("this CPU", None)
HOPPER = Device("H200", (9, 0))
BLACKWELL = Device("B200", (10, 0))


def written(tmp_path: Path, text: str) -> recipe.Recipe:
    file = tmp_path / "r.yaml"
    file.write_text("version: 1\n" + text)
    return recipe.load(str(file))


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_a_decode_server_prefills_as_it_decodes(name: str) -> None:
    asked = recipe.load(name)
    own, selection = pairs.select_for(asked, CPU, pairs.DECODE)
    assert selection.prefill == selection.decode == asked.decode
    assert (selection.kernels == {}) == (policy.decodes_low(asked) == "")
    assert selection.reason == pairs.NO_COPIES
    for rule in own.layers:
        assert rule.prefill == rule.decode
    for mode in ("", pairs.PREFILL):
        assert pairs.select_for(asked, CPU, mode) == (asked, select(asked, CPU))


def test_rules_keep_their_decode_precision_and_no_other(tmp_path: Path) -> None:
    asked = written(
        tmp_path,
        "prefill: {precision: nvfp4, min_tokens: 64}\n"
        "layers:\n"
        "  - {match: 're:.*down_proj', prefill: fp8}\n"
        "  - {match: 're:.*o_proj', prefill: fp8, decode: nvfp4}\n",
    )
    own = pairs.of_decode_server(asked)
    matcher = RuleMatcher(own.layers, FUSED)
    name = "model.layers.0.{}".format
    for layer, wanted in (
        ("mlp.gate_up_proj", "bf16"),
        ("mlp.down_proj", "bf16"),
        ("self_attn.o_proj", "nvfp4"),
    ):
        assert matcher.precisions(name(layer), own.prefill, own.decode) == (wanted, wanted)
    assert own.min_tokens == 1


def test_ready_made_weights_are_opened_by_who_multiplies_them(tmp_path: Path) -> None:
    text = "prefill: {precision: nvfp4, weights: ./weights}\n"
    assert pairs.of_decode_server(written(tmp_path, text)).prefill_weights == ""
    everywhere = written(tmp_path, text + "decode: {precision: nvfp4}\n")
    assert pairs.of_decode_server(everywhere).prefill_weights == everywhere.prefill_weights


def test_keys_and_values_have_the_name_that_the_prefill_server_gives_them() -> None:
    asked = recipe.load("auto")
    for device in (CPU, HOPPER, BLACKWELL):
        assert pairs.kv_fingerprint(asked, device) == fingerprint(asked, select(asked, device))
    native = replace(asked, kernel="native")
    assert pairs.kv_fingerprint(native, CPU) not in {pairs.kv_fingerprint(native, BLACKWELL), policy.BF16}
    assert pairs.kv_fingerprint(recipe.load("bf16"), CPU) == policy.BF16


def who(name: str = "auto", device: Device = CPU, **changes: str) -> pairs.Identity:
    asked = recipe.load(name)
    found = pairs.identity(asked, pairs.kv_fingerprint(asked, device), model="m", weights="w")
    return replace(found, **changes)


def test_a_pair_of_one_recipe_and_model_fits() -> None:
    assert pairs.misfit(who(), who()) is None
    assert pairs.misfit(who("bf16"), who("bf16")) is None


def test_a_pair_of_two_kinds_of_gpu_fits_unless_keys_and_values_are_kept() -> None:
    ours, theirs = who(device=HOPPER), who(device=BLACKWELL)
    assert ours.fingerprint != theirs.fingerprint
    assert pairs.misfit(ours, theirs) is None
    assert pairs.misfit(ours, theirs, theirs.fingerprint) is None
    refused = pairs.misfit(ours, theirs, ours.fingerprint)
    assert refused and "one kind of GPU" in refused


@pytest.mark.parametrize(
    ("theirs", "why"),
    [
        (None, "runs without mixquant"),
        (who("bf16"), "recipe auto"),
        (who("fp8"), "recipe auto"),
        (who(version="0"), "the prefill server 0"),
        (who(model="n"), "other layers"),
        (who(weights="v"), "other weights"),
    ],
)
def test_what_does_not_fit_is_said(theirs: pairs.Identity | None, why: str) -> None:
    refused = pairs.misfit(who(), theirs)
    assert refused is not None and why in refused


def test_stock_prefill_fits_a_decode_server_that_is_bf16_throughout() -> None:
    assert pairs.misfit(who("bf16"), None) is None


def test_weights_are_compared_until_one_side_updates_them() -> None:
    assert pairs.misfit(who(weights=""), who()) is None
    assert pairs.misfit(who(), who(weights="")) is None


def test_identities_travel_as_json() -> None:
    ours = who()
    assert pairs.Identity.from_json({**ours.to_json(), "later": 1}) == ours
    for broken in (None, [], "x", {}, {**ours.to_json(), "model": 3}):
        assert pairs.Identity.from_json(broken) is None


def test_names_and_places_are_no_part_of_what_is_asked(tmp_path: Path) -> None:
    asked = recipe.load("nvfp4")
    assert asked_digest(asked) == asked_digest(replace(asked, name="other", source="elsewhere", description="x"))
    assert len({asked_digest(recipe.load(name)) for name in recipe.shipped()}) == len(recipe.shipped())
    elsewhere = replace(asked, prefill_weights="/a")
    assert asked_digest(elsewhere) == asked_digest(replace(asked, prefill_weights="/b")) != asked_digest(asked)
