from __future__ import annotations

import pytest

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.passes.running import _ROLE_OF_MODE, DECODE_PASS, Pass, current, role_of, scope
from mixquant_sglang.recipe.roles import Role


def test_low_precision_only_for_the_three_prefill_modes() -> None:
    low = {mode for mode in _ROLE_OF_MODE if role_of(mode) is Role.PROMPT}
    assert low == {"EXTEND", "MIXED", "SPLIT_PREFILL"}


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(MixQuantError, match="SHINY_NEW_MODE"):
        role_of("SHINY_NEW_MODE")


def test_scope_is_restored_also_after_an_error() -> None:
    assert current() is DECODE_PASS
    one = Pass(Role.PROMPT)
    with pytest.raises(KeyError), scope(one):
        assert current() is one
        raise KeyError
    assert current() is DECODE_PASS


def test_passes_do_not_nest() -> None:
    one = Pass(Role.PROMPT)
    with scope(one):
        with pytest.raises(RuntimeError, match="a decode pass began within a prompt pass"), scope(DECODE_PASS):
            pass
        assert current() is one


def test_each_mode_has_its_role() -> None:
    assert {role_of(mode) for mode in ("TARGET_VERIFY",)} == {Role.VERIFY}
    assert {role_of(mode) for mode in ("DRAFT_EXTEND", "DRAFT_EXTEND_V2")} == {Role.DRAFT}
    assert {role_of(mode) for mode in ("DECODE", "IDLE", "DLLM_EXTEND")} == {Role.DECODE}
