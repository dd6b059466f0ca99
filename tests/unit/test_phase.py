from __future__ import annotations

import pytest

from mixquant_sglang import phase
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.phase import DECODE_PASS, Pass, Phase


def test_low_precision_only_for_the_three_prefill_modes() -> None:
    low = {mode for mode in phase._PHASE_OF_MODE if phase.phase_of(mode) is Phase.PREFILL}
    assert low == {"EXTEND", "MIXED", "SPLIT_PREFILL"}


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(MixQuantError, match="SHINY_NEW_MODE"):
        phase.phase_of("SHINY_NEW_MODE")


def test_scope_is_restored_also_after_an_error() -> None:
    assert phase.current() is DECODE_PASS
    outer, inner = Pass(Phase.PREFILL), Pass(Phase.DECODE)
    with phase.scope(outer):
        with pytest.raises(KeyError), phase.scope(inner):
            assert phase.current() is inner
            raise KeyError
        assert phase.current() is outer
    assert phase.current() is DECODE_PASS
