"""The table of precisions by role and kind of operator."""

from __future__ import annotations

from mixquant_sglang import recipe
from mixquant_sglang.recipe.roles import Kind, PrecisionTable, Role, by_role


def test_a_recipes_columns_become_roles() -> None:
    assert by_role("nvfp4", "fp8") == {
        Role.PROMPT: "nvfp4",
        Role.PROTECTED: "fp8",
        Role.DECODE: "fp8",
        Role.VERIFY: "fp8",
        Role.DRAFT: "fp8",
    }


def test_each_role_and_kind_has_a_cell() -> None:
    table = PrecisionTable(by_role("fp8", "bf16"))
    assert len(table) == len(Role) * len(Kind) == len([*table])
    assert table[Role.PROMPT, Kind.LINEAR] == "fp8"
    assert {table[cell] for cell in table if cell != (Role.PROMPT, Kind.LINEAR)} == {"bf16"}
    assert table.row(Role.PROMPT) == {"linear": "fp8", "experts": "bf16", "attention": "bf16"}


def test_roles_are_their_own() -> None:
    """Protected rows take what their own cell says, whatever decode does."""
    table = PrecisionTable({**by_role("nvfp4", "bf16"), Role.PROTECTED: "fp8"})
    assert table[Role.PROTECTED, Kind.LINEAR] == "fp8" and table[Role.DECODE, Kind.LINEAR] == "bf16"


def test_in_words() -> None:
    words = PrecisionTable(by_role("fp8", "bf16")).describe()
    assert words == ("prompt fp8 (linear), bf16 (experts), bf16 (attention); protected, decode, verify, draft bf16")
    assert PrecisionTable(by_role("bf16", "bf16")).describe() == "prompt, protected, decode, verify, draft bf16"


def test_the_precisions_are_those_that_have_a_capability() -> None:
    assert recipe.PRECISIONS == ("bf16", "nvfp4", "fp8", "w8a16", "w4a16")
