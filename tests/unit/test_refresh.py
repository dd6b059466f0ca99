"""Packed copies and their masters: what runs while they differ, and what brings them together again."""

from __future__ import annotations

import logging

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import MASTER_PASS
from mixquant_sglang.recipe.roles import by_role
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.weights.refresh import Weights, fingerprint

CPU = torch.device("cpu")


class Layer:
    def __init__(self, name: str, decodes_low: bool = False) -> None:
        self.name, self.shape, self.extra_bytes, self.decodes_low = name, (1, 1), 0, decodes_low
        self.master, self.copy, self.by_value = 1.0, 0.0, ()  # type: tuple[float, float, tuple[float, ...]]
        self.fails: str | None = None
        self.decodes_by_value = decodes_low
        self.masterless, self.precision = False, by_role("nvfp4", "nvfp4")

    @property
    def stale(self) -> bool:
        return self.copy != self.master

    def pack(self) -> None:
        if self.fails:
            raise RuntimeError(self.fails)
        self.copy = self.master


def make(decodes_low: bool = False) -> tuple[Weights, Layer, Layer]:
    weights, layers = Weights(), [Layer("a", decodes_low), Layer("b", decodes_low)]
    weights.layers.extend(layers)
    for layer in layers:
        weights.loaded(layer)
    weights.finish_load()
    return weights, layers[0], layers[1]


def test_what_the_loader_did_not_pack_is_packed_at_the_end() -> None:
    """``--load-format remote_instance`` never asks for it, ``sharded_state`` before it has the weights."""
    weights, first, second = Weights(), Layer("a"), Layer("b")
    weights.layers.extend([first, second])
    first.master = 0.5
    weights.loaded(first)
    first.master = 1.0
    weights.finish_load()
    assert first.copy == second.copy == 1.0 and weights.current


def test_a_layer_that_cannot_be_packed_ends_the_start_with_its_name() -> None:
    weights, layer = Weights(), Layer("model.layers.3.x")
    weights.layers.append(layer)
    layer.fails = "a NaN"
    weights.loaded(layer)
    with pytest.raises(MixQuantError, match=r"cannot pack model\.layers\.3\.x: a NaN"):
        weights.finish_load()


def test_a_failed_packing_stays_until_a_later_one_succeeds(caplog: pytest.LogCaptureFixture) -> None:
    weights, first, second = make()
    first.master = second.master = 2.0
    first.fails = "no memory"
    weights.changed()
    assert not weights.current
    for _ in range(3):
        assert weights.refresh() == "cannot pack a: no memory" and not weights.current
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    first.fails = None
    assert weights.refresh() and not weights.current  # not tried again in each pass
    weights.changed()
    assert weights.refresh() is None and weights.current
    assert first.copy == second.copy == 2.0


def test_a_rank_that_fails_fails_all() -> None:
    weights, *_ = make()
    weights.agree = lambda problem: problem or "cannot pack c: on another rank"
    weights.changed()
    assert weights.refresh() == "cannot pack c: on another rank" and not weights.current


def test_nothing_is_packed_while_it_is_written_or_released() -> None:
    weights, first, _ = make()
    weights.hold("the memory is released")
    first.master = 2.0
    assert weights.refresh() and not weights.current and first.copy == 1.0
    weights.changed()
    assert weights.refresh() is None and first.copy == 2.0


def test_a_session_is_packed_when_it_ends() -> None:
    weights, first, _ = make()
    weights.begin()
    for value in (2.0, 3.0):
        weights.hold("an update")
        first.master = value
        weights.written()
        assert weights.refresh() and not weights.current and first.copy == 1.0
    weights.end()
    assert weights.current and first.copy == 3.0


def test_graphs_that_hold_another_number_are_not_replayed(caplog: pytest.LogCaptureFixture) -> None:
    weights, first, _ = make()
    first.by_value = (1.0,)
    weights.captured()
    assert weights.fits_graphs()
    for by_value, fits in (((1.0,), True), ((2.0,), False), ((1.0,), True)):
        first.by_value = by_value
        weights.changed()
        weights.refresh()
        assert weights.fits_graphs() is fits is weights.fits_graphs()
    assert [r.getMessage()[:45] for r in caplog.records if r.levelno == logging.WARNING] == [
        "mixquant: the new weights of a have another s"
    ]


@pytest.mark.parametrize("holds", [True, False])
def test_decode_graphs_that_hold_no_number_are_replayed(holds: bool) -> None:
    """W4A16 decode reads the scale that prefill graphs of the same weights hold by value."""
    asked = recipe.load("nvfp4-compact")
    run, layer = Runtime(asked, select(asked, Device("this CPU", None))), Layer("a", decodes_low=True)
    layer.decodes_by_value, layer.by_value = holds, (1.0,)
    run.weights.layers.append(layer)
    run.weights.finish_load()
    layer.by_value = (2.0,)
    run.weights.changed()
    assert not run.graphs.can_replay_decode()
    run.weights.refresh()
    assert run.graphs.can_replay_decode() is not holds
    assert not run.graphs.can_replay(run.schedule.prefill([RequestRows(8, 0, 9)], CPU))


@pytest.mark.parametrize("name", ["nvfp4-emulated", "nvfp4-everywhere"])
def test_passes_run_from_the_masters_until_all_is_packed(name: str) -> None:
    asked = recipe.load(name)
    run = Runtime(asked, select(asked, Device("this CPU", None)))
    run.weights.layers.append(Layer("a", run.selection.decode != "bf16"))
    run.weights.finish_load()
    requests = [RequestRows(100, 0, 100), RequestRows(1, 5, 4, True)]
    usual = run.schedule.prefill(requests, CPU)
    assert usual.precision == "nvfp4" and run.graphs.can_replay_decode()
    run.weights.hold("an update is open")
    plan = run.schedule.prefill(requests, CPU)
    assert plan.running is MASTER_PASS and plan.precision == "bf16"
    assert plan.tokens == {("prefill", "bf16"): 100, ("decode", "bf16"): 1}
    assert not run.graphs.can_replay(plan)
    assert run.graphs.can_replay_decode() is (run.selection.decode == "bf16")
    run.count_decode(3)
    assert run.counters.by_phase("decode") == {"bf16": 3}
    run.weights.changed()
    run.weights.refresh()
    assert run.schedule.prefill(requests, CPU).tokens == usual.tokens and run.graphs.can_replay_decode()


@pytest.mark.parametrize("kernel", [EmulatedNVFP4, EmulatedFP8])
@pytest.mark.parametrize("factor", [2.0**-10, 1.0, 3.0])
def test_packing_again_is_packing_anew(kernel: type[EmulatedNVFP4] | type[EmulatedFP8], factor: float) -> None:
    """Whatever the copies held before, also after their memory was lost."""
    torch.manual_seed(0)
    weight = torch.randn(48, 64).bfloat16()
    packed, new = kernel(weight), (weight * factor)
    where = [t.data_ptr() for t in packed.tensors()]
    for tensor in packed.tensors():
        tensor.copy_(torch.full_like(tensor.float(), 3e-5).to(tensor.dtype))
    packed.refresh(new)
    fresh = kernel(new)
    assert [t.data_ptr() for t in packed.tensors()] == where
    for a, b in zip(packed.tensors(), fresh.tensors(), strict=True):
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    assert packed.by_value == fresh.by_value
    x = torch.randn(5, 64).bfloat16()
    assert torch.equal(packed.matmul(x, None), fresh.matmul(x, None))


def test_a_fingerprint_sees_one_bit_and_where_it_is() -> None:
    weight = torch.randn(16, 32).bfloat16()
    before = fingerprint(weight)
    assert before == fingerprint(weight.clone())
    other = weight.clone()
    other.view(torch.int16)[3, 4] ^= 1
    assert fingerprint(other) != before != fingerprint(weight.flip(0))


def test_streams_wait_for_what_is_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --enable-pdmux another stream may still read the old copies, and reads the new ones next."""
    weights, first, second = make()
    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append((first.copy, second.copy)))
    weights.refresh()
    assert seen == []  # nothing changed
    first.master = second.master = 2.0
    weights.changed()
    weights.refresh()
    assert weights.current and seen == [(1.0, 1.0), (2.0, 2.0)]
