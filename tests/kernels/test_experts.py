"""Packed experts on a CPU, where they are the reference: against plain torch with the numbers that they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels import registry
from mixquant_sglang.kernels.experts.base import Form, Masters, Ready, halves
from mixquant_sglang.kernels.experts.emulated import Emulated, EmulatedFP8Experts, EmulatedNVFP4Experts
from mixquant_sglang.kernels.experts.weight_only import NativeW8A16Experts
from mixquant_sglang.kernels.limits import FEW_ROWS, FEW_UNSORTED
from mixquant_sglang.kernels.packing import quantize_nvfp4
from mixquant_sglang.kernels.tuning import expert_cache
from mixquant_sglang.recipe.roles import Kind
from tests.support.experts import OAI, dequantised, error, masters, reference, routed

FORMS = {
    "silu": Form(),
    "gelu": Form("gelu", scaling=2.5),
    "gpt-oss": OAI,
    "weighted input": Form(weighted_input=True),
}
CLASSES = (EmulatedFP8Experts, EmulatedNVFP4Experts)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("made", CLASSES)
def test_the_numbers_are_those_of_its_weights(made: Any, form: Form) -> None:
    """Inputs that quantising does not change leave the activations between the products as the one difference."""
    of = masters(5, 32, 64, bias=form is OAI)
    x, weights, ids = routed(9, 5, 64, 2)
    x = nvfp4.quantize_activations(x).dequantize() if made.precision == "nvfp4" else x
    ids[2] = -1
    ids[3, 0] = -1
    got = made(of, form).run(x, weights, ids)
    assert got.dtype == torch.bfloat16 and got.shape == x.shape
    low = error(got, reference(x, weights, ids, dequantised(of, made.precision), form))
    assert low < (0.05 if made.precision == "fp8" else 0.16)  # of the hidden rows, and FP8's of x
    assert error(got, reference(x, weights, ids, of, form)) > low  # it does hold other weights


@pytest.mark.parametrize("made", CLASSES)
def test_rows_are_independent(made: Any) -> None:
    of = masters(4, 32, 64)
    x, weights, ids = routed(7, 4, 64, 2)
    packed = made(of, Form())
    whole = packed.run(x, weights, ids)
    x[3] *= 1e4
    ids[3] = torch.tensor([2, 3])
    changed = packed.run(x, weights, ids)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(whole[others], changed[others]) and not torch.equal(whole[3], changed[3])
    assert torch.equal(packed.run(x[5:], weights[5:], ids[5:]), changed[5:])
    assert packed.run(x[:0], weights[:0], ids[:0]).shape == (0, 64)


@pytest.mark.parametrize("made", CLASSES)
def test_refresh_is_packing_anew_in_place(made: Any) -> None:
    old, new = masters(3, 32, 64, bias=True), masters(3, 32, 64, bias=True, seed=7)
    packed, fresh = made(old, OAI), made(new, OAI)
    addresses = [t.data_ptr() for t in packed.tensors()]
    packed.refresh(new)
    assert [t.data_ptr() for t in packed.tensors()] == addresses
    for got, want in zip(packed.tensors(), fresh.tensors(), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    before = [t.clone() for t in packed.tensors()]
    bad = new._replace(w2=new.w2.clone())
    bad.w2[2, 1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        packed.refresh(bad)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(packed.tensors(), before, strict=True)
    )
    with pytest.raises(ValueError, match="NaN"):
        made(bad, OAI)


def test_ready_made_experts_are_used_as_they_are() -> None:
    of, form = masters(3, 32, 64), Form()

    def ready(expert: int) -> Ready:
        gate, up = (quantize_nvfp4(part * 3, scales="absmax") for part in of.w13[expert].chunk(2))
        return Ready([gate, up], quantize_nvfp4(of.w2[expert], scales="absmax"))

    packed = EmulatedNVFP4Experts(of, form, ready=ready)
    x, weights, ids = routed(5, 3, 64, 2)
    x = nvfp4.quantize_activations(x).dequantize()
    w13 = torch.stack([torch.cat([part.dequantize(torch.float32) for part in ready(e).w13]) for e in range(3)])
    w2 = torch.stack([ready(e).w2.dequantize(torch.float32) for e in range(3)])
    assert error(packed.run(x, weights, ids), reference(x, weights, ids, Masters(w13, w2), form)) < 0.16
    first = [t.clone() for t in packed.tensors()]
    packed.refresh(of)
    packed.replace(ready)
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(packed.tensors(), first, strict=True)
    )
    with pytest.raises(ValueError, match="fp8"):
        EmulatedFP8Experts(of, form, ready=ready)
    with pytest.raises(ValueError, match="fp8"):
        EmulatedFP8Experts(of, form).replace(ready)


def test_interleaved_weights_are_the_same_experts() -> None:
    of = masters(3, 32, 64, bias=True)
    w13 = torch.stack(of.w13.chunk(2, dim=1), dim=2).flatten(1, 2)
    bias = torch.stack(of.bias13.chunk(2, dim=1), dim=2).flatten(1, 2)  # type: ignore[union-attr]
    mixed = of._replace(w13=w13, bias13=bias)
    form = replace(OAI, interleaved=False)
    assert torch.equal(halves(w13, OAI), of.w13)
    x, weights, ids = routed(5, 3, 64, 2)
    for made in CLASSES:
        assert torch.equal(made(of, form).run(x, weights, ids), made(mixed, OAI).run(x, weights, ids))  # type: ignore[abstract]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("made", CLASSES)
def test_partial_sums_of_ranks_add_up(made: Any, form: Form) -> None:
    """Expert parallel: the same numbers but for the rounding of each partial sum.  Tensor parallel: slices of I have
    scales of their own, so the numbers are as near to the masters as those of one rank."""
    of = masters(4, 64, 64)
    x, weights, ids = routed(9, 4, 64, 3)
    whole = made(of, form).run(x, weights, ids)
    by_experts, by_columns = torch.zeros(x.shape), torch.zeros(x.shape)
    for rank in range(2):
        mine = slice(2 * rank, 2 * rank + 2)
        local = torch.where((ids >= mine.start) & (ids < mine.stop), ids - mine.start, -1)
        by_experts += made(of._replace(w13=of.w13[mine], w2=of.w2[mine]), form).run(x, weights, local).float()
        inner = slice(32 * rank, 32 * rank + 32)
        pairs = of.w13.unflatten(1, (64, 2) if form.interleaved else (2, 64))
        cut = (pairs[:, inner] if form.interleaved else pairs[:, :, inner]).flatten(1, 2).contiguous()
        share = of._replace(w13=cut, w2=of.w2[:, :, inner].contiguous())
        by_columns += made(share, form).run(x, weights, ids).float()
    assert error(by_experts, whole) < 2**-7
    exact = reference(x, weights, ids, of, form)
    assert error(by_columns, exact) < 1.25 * error(whole, exact)


def test_sizes_that_no_kernel_takes_are_refused_by_the_registry() -> None:
    for precision, kernel in (("fp8", "native"), ("fp8", "emulated"), ("nvfp4", "emulated")):
        assert registry.refusal(precision, kernel, 768, 2048, Kind.EXPERTS) is None
        for sizes in ((768, 2040), (100, 2048)):
            refusal = registry.refusal(precision, kernel, *sizes, Kind.EXPERTS)
            assert refusal == f"experts of [{sizes[0]}, {sizes[1]}] are not a multiple of 16 in both sizes"
        assert registry.packed_experts(precision, kernel).precision == precision


def test_routes_for_timing_where_a_rank_has_fewer_experts_than_a_token_takes() -> None:
    """As a rank of Mixtral's eight experts has with --ep-size 8."""
    seed = torch.Generator().manual_seed(0)
    for experts, k in ((1, 2), (4, 8), (8, 2)):
        weights, ids = expert_cache.routed(5, experts, k, torch.device("cpu"), seed)
        assert weights.shape == ids.shape == (5, k) and ids.dtype == torch.int32
        held = min(k, experts)
        assert all(len({*row}) == held and max(row) < experts for row in ids[:, :held].tolist())
        assert bool((ids[:, :held] >= 0).all()) and bool((ids[:, held:] == -1).all())


class Broken:
    """Experts that no tiles run from ``least`` rows on."""

    def __init__(self, least: int) -> None:
        self.least = least

    def run_with(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        if len(x) >= self.least:
            raise RuntimeError("out of resource: shared memory\nsecond line")
        return x


def test_rows_that_no_tiles_run_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(expert_cache, "_captured", lambda call: (call(), call)[1])
    monkeypatch.setattr(expert_cache, "milliseconds", lambda calls, _: [call() is None or 1.0 for call in calls])
    cells = expert_cache._measure_shape((8, 64, 64, 2), Broken(64), [16, 64], torch.device("cpu"))
    assert [rows for *_, rows in cells] == [16]
    (said,) = caplog.messages
    assert (
        said.startswith("mixquant: no tiles run 64 rows of FP8 experts [8, 64, 64, 2] here (") and "second" not in said
    )
    assert "16: out of resource: shared memory" in said


def test_experts_that_no_tiles_run_end_the_start() -> None:
    with pytest.raises(
        MixQuantError, match=r"no tiles run 16 rows .*out of resource: shared memory\); use 'kernel: emu"
    ):
        expert_cache._measure_shape((8, 64, 64, 2), Broken(1), [16, 64], torch.device("cpu"))


@pytest.mark.parametrize(
    ("registers", "widens", "most"),
    [(True, True, FEW_ROWS), (True, False, FEW_ROWS), (False, True, FEW_UNSORTED), (False, False, FEW_ROWS)],
)
def test_up_to_how_many_rows_packed_experts_are_not_sorted(
    registers: bool, widens: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``registers``: this Triton suits ``expert_warps.py``.  A GPU that does not widen FP8 where it multiplies would
    write all weights of the layer as BF16 to sort a few rows."""
    expert_warps = pytest.importorskip("mixquant_sglang.kernels.triton.expert_warps")
    ways: list[str] = []
    monkeypatch.setattr(expert_warps, "serves", lambda: registers)
    monkeypatch.setattr(NativeW8A16Experts, "_widens", staticmethod(lambda device: widens))
    monkeypatch.setattr(NativeW8A16Experts, "_by_pieces", lambda *args: ways.append("few"))
    monkeypatch.setattr(Emulated, "_on_gpu", lambda *args: ways.append("sorted"))
    experts = NativeW8A16Experts.of(EmulatedFP8Experts(masters(4, 32, 64), Form()))
    for rows in (1, most, most + 1, FEW_ROWS + 1):
        experts._on_gpu(*routed(rows, 4, 64, 2))
    assert ways == ["few", "few", "sorted", "sorted"]
