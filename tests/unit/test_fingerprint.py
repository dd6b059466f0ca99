"""Equal for what writes equal KV, different for everything else."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from typing import Any

import pytest

from mixquant_sglang import fingerprint as module
from mixquant_sglang import recipe
from mixquant_sglang.fingerprint import fingerprint
from mixquant_sglang.kernels import Device, select
from mixquant_sglang.recipe import LayerRule, Recipe

CPU, H200, B200 = Device("this CPU", None), Device("H200", (9, 0)), Device("B200", (10, 0))
BASE = recipe.load("nvfp4")


def of(asked: Recipe | str, device: Device = CPU, **more: Any) -> str:
    asked = recipe.load(asked) if isinstance(asked, str) else asked
    return fingerprint(asked, select(asked, device), **more)


def test_it_is_a_short_digest_and_always_the_same() -> None:
    assert re.fullmatch("[0-9a-f]{16}", of("nvfp4")) and of("nvfp4") == of("nvfp4")


def test_names_and_places_do_not_count() -> None:
    same = replace(BASE, name="x.yaml", source="/elsewhere/x.yaml", description="mine", verify=False)
    assert of(same) == of(BASE)
    assert of("auto") == of("nvfp4-fp8") and of("auto", B200) == of("nvfp4-fp8", B200)
    moved = replace(recipe.load("nvfp4-fp8"), layers=(replace(recipe.load("nvfp4-fp8").layers[0], where="a:1"),))
    assert of(moved) == of("nvfp4-fp8")


def test_all_bf16_is_one() -> None:
    rule = LayerRule("re:.*", "bf16", "bf16", "r:1")
    for asked in ("bf16", replace(BASE, prefill="bf16", layers=(rule,), min_tokens=9)):
        assert of(asked) == of(asked, B200, bf16_below=17) == "bf16"
    assert of(replace(BASE, prefill="bf16", layers=(replace(rule, prefill="fp8"),))) != "bf16"
    assert of(replace(BASE, prefill="bf16", decode="nvfp4")) != "bf16"


def test_shipped_recipes_and_kernels_differ() -> None:
    names = set(recipe.shipped()) - {"auto"}
    assert len({of(name) for name in names}) == len(names) - 1  # nvfp4 and nvfp4-emulated are the same on a CPU
    assert of("nvfp4") == of("nvfp4-emulated") and of("nvfp4", B200) != of("nvfp4-emulated", B200) == of("nvfp4", H200)


CHANGES: dict[str, Any] = {
    "prefill": "fp8",
    "min_tokens": 8,
    "fuse": False,
    "decode": "nvfp4",
    "protect_last_prompt_token": False,
    "scales": "absmax",
    "layers": (LayerRule("re:.*down_proj", "bf16", None, "r:1"),),
    "protected_tail": 64,
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_changes_numbers_changes_it(field: str) -> None:
    assert of(replace(BASE, **{field: CHANGES[field]})) != of(BASE)


def test_every_field_of_a_recipe_is_thought_of() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    in_selection = {"prefill", "decode", "kernel", "layers", "prefill_weights"}
    assert fields >= module._NOT_NUMBERS >= in_selection
    assert {*CHANGES} == (fields - module._NOT_NUMBERS) | {"prefill", "decode", "layers"}


def test_device_and_weights_count() -> None:
    kinds = {of(BASE), of(BASE, bf16_below=17), of(BASE, ready_made="a"), of(BASE, ready_made="b"), of(BASE, B200)}
    assert len(kinds) == 5
