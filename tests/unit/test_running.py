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
    outer, inner = Pass(Role.PROMPT), Pass(Role.DECODE)
    with scope(outer):
        with pytest.raises(KeyError), scope(inner):
            assert current() is inner
            raise KeyError
        assert current() is outer
    assert current() is DECODE_PASS
