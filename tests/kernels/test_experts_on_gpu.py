"""Experts on a GPU: grouped products and the kernels of few rows, against the CPU's reference and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixquant_sglang.kernels.experts.base import Form, Masters
from mixquant_sglang.kernels.experts.emulated import EmulatedFP8Experts, EmulatedNVFP4Experts
from mixquant_sglang.kernels.experts.native_fp8 import NativeFP8Experts
from mixquant_sglang.kernels.experts.weight_only import NativeW4A16Experts, NativeW8A16Experts
from tests.support.experts import OAI, dequantised, error, held, masters, reference, routed

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from mixquant_sglang.kernels.triton.expert_rows import expert_rows_, matrix_rows_
from mixquant_sglang.kernels.triton.expert_warps import warp_rows_
from mixquant_sglang.kernels.tuning.expert_tiles import CANDIDATES

pytestmark = pytest.mark.gpu

NATIVE = torch.cuda.get_device_capability() >= (8, 9)
FORMS = {
    "silu": Form(),
    "gelu": Form("gelu", scaling=2.5),
    "gpt-oss": OAI,
    "weighted input": Form(weighted_input=True),
}
# experts, I, H, experts a token: small ones, Gemma-4's odd I, gpt-oss's odd sizes
SIZES = {"small": (4, 48, 80, 2), "one": (3, 64, 128, 1), "704": (16, 704, 320, 8), "ten": (32, 128, 256, 10)}


def to(of: Masters, device: str) -> Masters:
    return Masters(*(None if t is None else t.to(device) for t in of))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("made", [NativeFP8Experts, EmulatedFP8Experts, EmulatedNVFP4Experts])
def test_the_gpu_computes_what_the_cpu_does(made: Any, sizes: tuple[int, int, int, int], form: Form) -> None:
    if made.kernel == "native" and not NATIVE:
        pytest.skip("no FP8 tensor cores")
    experts, i, h, k = sizes
    of = masters(experts, i, h, bias=form is OAI)
    on_cpu = EmulatedNVFP4Experts(of, form) if made.precision == "nvfp4" else EmulatedFP8Experts(of, form)
    on_gpu = made(to(of, "cuda"), form)
    exact = dequantised(of, made.precision)
    for tokens in (1, 17, 300):
        x, weights, ids = routed(tokens, experts, h, k)
        ids[tokens // 2] = -1
        want = reference(x, weights, ids, exact, form)
        on = (x.cuda(), weights.cuda(), ids.cuda())
        got, cpu = on_gpu.run(*on), on_cpu.run(x, weights, ids)
        # Elements at a rounding boundary may take the next code, in one as in the other: no farther from the truth.
        assert error(got.cpu(), want) <= 1.25 * error(cpu, want) + 1e-3, tokens
        assert (got.cpu() - want).norm() <= 1.03 * (cpu - want).norm() + 1e-3 * want.norm(), tokens
        assert torch.equal(got, on_gpu.run(*on))


@pytest.mark.skipif(not NATIVE, reason="no FP8 tensor cores")
@pytest.mark.parametrize("tiles", CANDIDATES)
def test_all_tiles_give_the_same_rows_whoever_is_beside_them(tiles: str) -> None:
    of = to(masters(8, 256, 512), "cuda")
    packed = NativeFP8Experts(of, Form())
    x, weights, ids = routed(700, 8, 512, 4, device="cuda")
    try:
        whole = packed.run_with(x, weights, ids, CANDIDATES[tiles])
    except RuntimeError as error_:  # Triton's, of shared memory that this GPU has not
        pytest.skip(str(error_)[:200])
    few = packed.run_with(x[13:90], weights[13:90], ids[13:90], CANDIDATES[tiles])
    assert torch.equal(few, whole[13:90])
    x[100:] = float("nan")
    assert torch.equal(packed.run_with(x, weights, ids, CANDIDATES[tiles])[:100], whole[:100])


def test_it_can_be_captured_and_reads_new_routes() -> None:
    made = NativeFP8Experts if NATIVE else EmulatedFP8Experts
    packed = made(to(masters(8, 64, 128), "cuda"), Form())
    x, weights, ids = routed(50, 8, 128, 2, device="cuda")
    packed.run(x, weights, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed.run(x, weights, ids)
    for seed in (3, 4):
        for kept, new in zip((x, weights, ids), routed(50, 8, 128, 2, device="cuda", seed=seed), strict=True):
            kept.copy_(new)
        graph.replay()
        assert torch.equal(out, packed.run(x, weights, ids))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("used", "slots"), [(0, 4), (1, 1), (1, 64), (3, 16), (64, 64)])
def test_few_rows(used: int, slots: int, sizes: tuple[int, int, int, int], form: Form) -> None:
    experts, i, h, k = sizes
    of = masters(experts, i, h, bias=form is OAI, device="cuda", scale=0.5 / h**0.5)
    x, weights, ids = routed(90, experts, h, k, device="cuda")
    ids[7] = -1
    rows = torch.randperm(90, generator=torch.Generator().manual_seed(used))[:used].sort().values
    index = torch.full((slots,), -1, dtype=torch.int64)
    index[:used] = rows
    out = torch.full((90, h), 7.0, dtype=torch.bfloat16, device="cuda")
    expert_rows_(out, index.cuda(), x, weights, ids, of, form)
    others = [t for t in range(90) if t not in rows.tolist()]
    assert bool((out[others] == 7).all())
    if used:
        picked = rows.cuda()
        want = reference(x[picked], weights[picked], ids[picked], of, form)
        assert error(out[picked], want) < 0.01
        alone = torch.zeros_like(out)
        expert_rows_(alone, picked[:1].contiguous(), x, weights, ids, of, form)
        assert torch.equal(alone[picked[0]], out[picked[0]])  # no row depends on the others


PACKED: dict[str, tuple[Any, Any]] = {
    "fp8": (EmulatedFP8Experts, NativeW8A16Experts),
    "nvfp4": (EmulatedNVFP4Experts, NativeW4A16Experts),
}
WIDE = {"704": SIZES["704"], "ten": SIZES["ten"], "64": (3, 64, 128, 1), "2048": (16, 768, 2048, 8)}


def reader_of(precision: str, of: Masters, form: Form) -> Any:
    packs, reads = PACKED[precision]
    return reads.of(packs(of, form, scales="search"))


def placed(run: Any, reader: Any, index: torch.Tensor, *routed_rows: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(routed_rows[0], 7.0)
    run(out, index, *routed_rows, reader._matrix(0), reader._matrix(1), reader._form)
    return out


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("sizes", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("run", [matrix_rows_, warp_rows_])
def test_few_rows_of_packed_weights(run: Any, precision: str, sizes: tuple[int, int, int, int], form: Form) -> None:
    experts, i, h, k = sizes
    of = masters(experts, i, h, bias=form is OAI, device="cuda", scale=0.5 / h**0.5)
    reader = reader_of(precision, of, form)
    x, weights, ids = routed(90, experts, h, k, device="cuda")
    ids[7] = -1
    exact = held(of, precision, form)
    for used, slots in ((0, 4), (1, 1), (1, 64), (3, 16), (8, 8), (64, 64)):
        rows = torch.randperm(90, generator=torch.Generator().manual_seed(used))[:used]
        index = torch.full((slots,), -1, dtype=torch.int64)
        index[:used] = rows
        out = placed(run, reader, index.cuda(), x, weights, ids)
        others = [t for t in range(90) if t not in rows.tolist()]
        assert bool((out[others] == 7).all())
        if used:
            picked = rows.cuda()
            want = reference(x[picked], weights[picked], ids[picked], exact, form)
            assert error(out[picked], want) < 0.01, (used, slots)
            for at in {0, used - 1}:  # no row depends on the others, nor on how many there are
                alone = placed(run, reader, picked[at : at + 1].contiguous(), x, weights, ids)
                assert torch.equal(alone[picked[at]], out[picked[at]]), (used, slots)


@pytest.mark.parametrize("precision", PACKED)
def test_kernels_that_start_early_wait_for_what_they_read(precision: str) -> None:
    """In a graph each kernel may start before the one that it follows ends: layer after layer, each of the result of
    the one before, in memory that is used again."""
    readers = [reader_of(precision, masters(16, 256, 512, device="cuda", scale=0.02, seed=n), Form()) for n in range(4)]
    x, weights, ids = routed(64, 16, 512, 4, device="cuda")

    def layers(rows: int) -> torch.Tensor:
        each = x[:rows]
        for reader in readers * 3:
            out = torch.empty_like(each)
            index = torch.arange(rows, device="cuda")
            run = (out, index, each, weights[:rows], ids[:rows], reader._matrix(0), reader._matrix(1), Form())
            warp_rows_(*run)
            each = each + out
        return each

    for rows in (1, 2, 8, 64):
        warm = layers(rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = layers(rows)
        for seed in range(20):
            for kept, new in zip((x, weights, ids), routed(64, 16, 512, 4, device="cuda", seed=seed), strict=True):
                kept.copy_(new)
            graph.replay()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(made, layers(rows)), (rows, seed)
        del graph, warm


def test_few_rows_refuses() -> None:
    of = masters(4, 48, 80, device="cuda")
    x, weights, ids = routed(90, 4, 80, 2, device="cuda")
    with pytest.raises(ValueError, match="at most 64 rows"):
        expert_rows_(x, torch.arange(65, device="cuda"), x, weights, ids, of, Form())
