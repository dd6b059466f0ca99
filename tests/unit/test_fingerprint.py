"""The fingerprint changes with every field that decides numbers, and with no other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.recipe import LayerRule, Recipe
from mixquant_sglang.recipe import fingerprint as module
from mixquant_sglang.recipe.fingerprint import fingerprint
from mixquant_sglang.recipe.select import Device, Selection, select

RULE = LayerRule("re:.*down_proj", "fp8", None, "a.yaml:7")
RECIPE = dataclasses.replace(recipe.load("nvfp4"), layers=(RULE,), prefill_weights="somewhere")
SELECTION = select(RECIPE, Device("a GPU", (10, 0)))
NO_NUMBERS = {"name", "source", "description", "prefill_weights_at", "verify", "where", "optional", "reason"}
NO_NUMBERS |= {"prefill_rounding", "min_tokens_by"}  # what is taken, not what it is; who says it
RESOLVED = {"prefill", "decode", "kernel", "prefill_weights"}  # in the selection, or by content


def other(value: Any) -> Any:
    """A value of the same type that is not ``value``."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if value is None:
        return "bf16"
    if isinstance(value, tuple):
        return (*value, *value)
    assert isinstance(value, dict), f"a field of type {type(value).__name__}: say here how another value looks"
    return {**value, "another": "native"}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe)])
def test_fields_of_the_recipe(field: str) -> None:
    changed = dataclasses.replace(RECIPE, **{field: other(getattr(RECIPE, field))})
    same = fingerprint(changed, SELECTION) == fingerprint(RECIPE, SELECTION)
    assert same == (field in NO_NUMBERS | RESOLVED)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LayerRule)])
def test_fields_of_a_rule(field: str) -> None:
    rule = dataclasses.replace(RULE, **{field: other(getattr(RULE, field))})
    changed = dataclasses.replace(RECIPE, layers=(rule,))
    assert (fingerprint(changed, SELECTION) == fingerprint(RECIPE, SELECTION)) == (field in NO_NUMBERS)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Selection)])
def test_fields_of_the_selection(field: str) -> None:
    changed = dataclasses.replace(SELECTION, **{field: other(getattr(SELECTION, field))})
    assert (fingerprint(RECIPE, changed) == fingerprint(RECIPE, SELECTION)) == (field in NO_NUMBERS)


def test_it_is_short_and_does_not_depend_on_the_order_of_a_mapping() -> None:
    kernels = dict(SELECTION.kernels)
    backwards = dataclasses.replace(SELECTION, kernels=dict(reversed(kernels.items())))
    assert len(kernels) > 1
    assert fingerprint(RECIPE, backwards) == fingerprint(RECIPE, SELECTION)
    assert len(fingerprint(RECIPE, SELECTION)) == 16
    assert int(fingerprint(RECIPE, SELECTION), 16) >= 0


def test_the_package_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(RECIPE, SELECTION)
    monkeypatch.setattr(module, "__version__", "0.0.0")
    assert fingerprint(RECIPE, SELECTION) != before


def test_ready_made_weights_count_by_content() -> None:
    made = {fingerprint(RECIPE, SELECTION, ready_made=content) for content in ("", "a", "b")}
    assert len(made) == 3


@pytest.mark.parametrize("device", [Device("this CPU", None), Device("a GPU", (10, 0))])
def test_all_bf16_is_one(device: Device) -> None:
    rule = LayerRule("re:.*", "bf16", "bf16", "r:1")
    for asked in (recipe.load("bf16"), dataclasses.replace(RECIPE, prefill="bf16", layers=(rule,), min_tokens=9)):
        assert fingerprint(asked, select(asked, device)) == "bf16"
    for more in ({"layers": (dataclasses.replace(rule, prefill="fp8"),)}, {"decode": "nvfp4"}):
        low = dataclasses.replace(RECIPE, **{"prefill": "bf16", "layers": (), **more})
        assert fingerprint(low, select(low, device)) != "bf16"


def test_shipped_recipes_differ_by_what_they_run() -> None:
    cpu, hopper, blackwell = Device("this CPU", None), Device("H200", (9, 0)), Device("B200", (10, 0))

    def of(name: str, device: Device) -> str:
        loaded = recipe.load(name)
        return fingerprint(loaded, select(loaded, device))

    names = set(recipe.shipped()) - {"auto"}
    assert len({of(name, cpu) for name in names}) == len(names) - 1  # nvfp4 and nvfp4-emulated are one on a CPU
    assert of("nvfp4", blackwell) != of("nvfp4-emulated", blackwell) == of("nvfp4", hopper)
    assert of("auto", blackwell) == of("nvfp4-fp8-down", blackwell)
    geforce = Device("RTX 5090", (12, 0))  # experts stay BF16 there
    assert of("nvfp4", blackwell) != of("nvfp4", geforce)
    assert of("fp8", blackwell) == of("fp8", geforce) == of("fp8", hopper)


def test_auto_is_what_it_comes_to() -> None:
    fp8, auto, hopper = recipe.load("fp8"), recipe.load("auto"), Device("H200", (9, 0))
    assert fingerprint(fp8, select(fp8, hopper)) != fingerprint(fp8, select(recipe.load("bf16"), hopper))
    same_rules = dataclasses.replace(fp8, prefill="auto", layers=())
    assert fingerprint(same_rules, select(same_rules, hopper)) == fingerprint(fp8, select(fp8, hopper))
    assert select(auto, hopper).prefill == "fp8"
