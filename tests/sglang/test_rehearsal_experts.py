"""The first run on a Blackwell GPU with Qwen3-MoE, rehearsed on the CPU (``tests/support/rehearsal.py``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sglang.test_rehearsal import play
from tests.support.rehearsal import BUCKETS, EXPERTS, HIDDEN, LAYERS, WITH_EXPERTS

pytestmark = pytest.mark.slow
NAMES = [scenario.name for scenario in WITH_EXPERTS]
NATIVE = ["experts, auto", "experts, auto on SM103", "experts, nvfp4-everywhere"]
SM120 = "experts, auto on SM120"
EMULATED = "experts, auto, emulated"
CALL = f"nvfp4 {EXPERTS} experts 128x{HIDDEN}"  # I = 64, padded
PROMPTS = [f"{name}, {rows}" for rows in (*BUCKETS, 64) for name in ("prompts", "middle chunk")]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play(tmp_path_factory.mktemp("rehearsal"), NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_captures_and_serves(played: dict[str, Any], name: str) -> None:
    assert not isinstance(played[name], str), f"{name}: {played[name]}"


@pytest.mark.parametrize("name", NATIVE)
def test_prompts_run_native_experts(played: dict[str, Any], name: str) -> None:
    """In all layers but the last, of which only the rows that are read are computed: protected ones, in BF16."""
    everywhere = name.endswith("everywhere")
    layers = LAYERS if everywhere else LAYERS - 1
    for which, done in played[name]["passes"].items():
        low = everywhere or which in PROMPTS
        assert (done["ran"].get(CALL, 0) >= 1) == low, which
        assert done["ran"].get(CALL, 0) == (layers if low else 0), which
    assert all(ran[CALL] == layers for ran in played[name]["captured"].values())
    state = played[name]["state"]
    assert state["experts"] == {"nvfp4": LAYERS} and state["kernel"]["nvfp4"] == "native"
    assert played[name]["at_load"][CALL] >= 2 + 2  # measured with 256 and 512 rows, and checked with two row counts


@pytest.mark.parametrize("name", NATIVE)
def test_replayed_graphs(played: dict[str, Any], name: str) -> None:
    for which in PROMPTS:
        done = played[name]["passes"][which]
        if int(which.rpartition(" ")[2]) in BUCKETS:
            assert done["replayed"] is not None and torch.equal(done["replayed"], done["logits"]), which


@pytest.mark.parametrize("name", ["experts, auto", "experts, auto on SM103", SM120, EMULATED])
def test_bf16_is_stock_to_the_bit(played: dict[str, Any], name: str) -> None:
    ours, stock = played[name]["passes"], played["experts, stock"]["passes"]
    for which in ours:
        if which == "decode behind bf16" or which.startswith("asked"):
            assert torch.equal(ours[which]["logits"], stock[which]["logits"]), which
    assert not torch.equal(ours["prompts, 64"]["logits"], stock["prompts, 64"]["logits"])


def test_native_is_as_near_to_stock_as_emulated(played: dict[str, Any]) -> None:
    """Their scales of rows differ, so the numbers do; an expert that was taken for another would be far away."""
    stock = played["experts, stock"]["passes"]
    far = {name: [] for name in ("experts, auto", EMULATED)}
    for name, errors in far.items():
        for which in (which for which in PROMPTS if which.startswith("prompts")):  # a middle chunk has no logits
            logits, expected = played[name]["passes"][which]["logits"], stock[which]["logits"]
            errors.append(float((logits - expected).norm() / expected.norm()))
    native, emulated = (sum(errors) / len(errors) for errors in far.values())
    assert 0 < native < 1.3 * emulated < 0.2, far


def test_sm100_and_sm103_are_the_same(played: dict[str, Any]) -> None:
    for which, done in played["experts, auto"]["passes"].items():
        assert torch.equal(done["logits"], played["experts, auto on SM103"]["passes"][which]["logits"]), which


def test_sm120_keeps_experts_in_bf16_and_says_so(played: dict[str, Any]) -> None:
    done = played[SM120]
    assert not any("experts" in call for done in done["passes"].values() for call in done["ran"])
    assert done["state"]["experts"] == {"bf16": LAYERS}
    reason = "NVFP4 experts with a scale for each token run on SM100 and SM103 alone"
    assert done["state"]["stays_bf16"][reason] == ", ".join(f"model.layers.{i}.mlp.experts" for i in range(LAYERS))
