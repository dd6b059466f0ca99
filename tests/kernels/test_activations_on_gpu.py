"""Quantised activations on a GPU. Codes are the oracle's bit for bit for the BF16 rows that the kernel quantised; those
rows are within half a BF16 step of float64, and SGLang's own but for rare last bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixquant_sglang.formats import fp8, nvfp4, scale_layout
from mixquant_sglang.kernels.triton import activations
from mixquant_sglang.kernels.triton.launch import FORMATS
from tests.kernels.test_triton_on_gpu import tokens

pytestmark = pytest.mark.gpu

SHAPES = [
    *[(0, 4096), (1, 48), (257, 48), (17, 208), (1000, 208), (257, 3584), (1, 4096), (1000, 4096), (17, 11008)],
    *[(257, 12288), (1, 27648), (17, 27648), (17, 32768), (257, 32768)],
]
EPS = 1e-6
RARE = 1e-3  # of BF16 results that differ from another kernel's, or from float64's, by one step

Results = tuple[torch.Tensor, ...]
Produce = Callable[..., Results]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits; any NaN equals any other."""
    assert got.dtype == want.dtype and got.shape == want.shape
    nan = got.float().isnan()
    assert torch.equal(nan, want.float().isnan())
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.view(integer)[~nan], want.view(integer)[~nan])


def all_same(got: Results, want: Results) -> None:
    for one, other in zip(got, want, strict=True):
        same(one, other)


def oracle(y: torch.Tensor, fmt: str) -> Results:
    if fmt == "fp8":
        eight = fp8.quantize_activations(y)
        return eight.data, eight.scales[:, None]
    four = nvfp4.quantize_activations(y)
    if fmt == "qdq":
        return (four.dequantize(),)
    as_weight = nvfp4.NVFP4Tensor(four.packed, four.block_scales, torch.tensor(1.0))
    return four.packed, as_weight.swizzled_scales(), four.row_scales


def poisoned(produce: Produce, fmt: str, **options: Any) -> Results:
    """The results in memory that was full of ones before: the allocator hands it out again."""
    for tensor in produce(fmt):
        tensor.view(torch.uint8).fill_(0xFF)
    return produce(fmt, **options)


def assert_rare(differ: torch.Tensor, what: str) -> None:
    print(f"{int(differ.sum())} of {differ.numel()} {what}")
    assert differ.sum() <= 1 + RARE * differ.numel()


def check_rows(produce: Produce, exact: torch.Tensor, fmt: str, error: float = 2**-17) -> None:
    """``produce`` keeps and quantises the rows ``exact`` [M, K], float64, which it knows to ``error``."""
    m, k = exact.shape
    kept = torch.full((m + 2, k), math.nan, dtype=torch.bfloat16, device="cuda")
    order = torch.randperm(m, device="cuda").int()
    quantised = poisoned(produce, fmt, slots=order, kept=kept)
    y = kept[order.long()]
    assert kept[m:].isnan().all()
    all_same(quantised, oracle(y, fmt))
    assert ((y.double() - exact).abs() <= exact.abs() * (2**-8 + error)).all()
    rounded = exact.float().bfloat16()
    assert_rare(y != rounded, "BF16 values differ from float64's")
    codes = quantised[0].view(torch.uint8) != oracle(rounded, fmt)[0].view(torch.uint8)
    rescaled = codes.float().mean(dim=1) > 0.01  # a row whose largest element moved
    assert_rare(codes[~rescaled], f"{fmt} codes differ from those of float64's rows")
    assert rescaled.sum() <= 1 + m / 100

    slots = torch.where(order % 3 == 0, order // 3, -1)
    kept.fill_(math.nan)
    all_same(poisoned(produce, fmt, slots=slots, kept=kept), quantised)
    count = len(range(0, m, 3))
    same(kept[slots[slots >= 0].long()], y[slots >= 0])
    assert kept[count:].isnan().all()
    all_same(poisoned(produce, fmt), quantised)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "magnitudes", "ties"])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_quantize(m: int, k: int, kind: str, fmt: str) -> None:
    x = tokens(m, k, kind) if m else torch.empty(0, k, dtype=torch.bfloat16, device="cuda")
    all_same(poisoned(lambda fmt: activations.quantize(x, fmt), fmt), oracle(x, fmt))


@pytest.mark.parametrize("exponent", [-120, -30, 0, 12, 105, 116])
def test_every_block_scale_with_every_significand(exponent: int) -> None:
    """All ties of E2M1 among them, which the FP16 products of ``_half_encode`` must decide as FP32 ones do."""
    codes = torch.arange(127, dtype=torch.uint8, device="cuda")
    scales = codes.view(torch.float8_e4m3fn).float().clamp(min=2.0**-11)  # 0 for blocks below 6 * 2^-10
    units = torch.cat([scales, scales.new_tensor([2.0**-127])])[:, None]  # 0 again, where codes do not saturate
    values = torch.cat([torch.arange(128.0, 256.0, device="cuda") * 2.0**-e for e in range(5, 12)]) * units
    values = torch.nn.functional.pad(values.minimum(6 * units), (0, 4)).reshape(-1, 15)
    blocks = torch.cat([values, (6 * units).repeat_interleave(60, 0)], dim=1)
    rows = torch.nn.functional.pad(blocks.reshape(len(units), -1), (0, 16), value=2688.0)  # [128, 976]
    x = (torch.cat([rows, -rows]) * 2.0**exponent).bfloat16()
    all_same(activations.quantize(x, "nvfp4"), oracle(x, "nvfp4"))


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantize_keeps_rows(fmt: str) -> None:
    x = tokens(257, 4096, "outliers")
    check_rows(lambda fmt, **options: activations.quantize(x, fmt, **options), x.double(), fmt)


def norm_inputs(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual = (tokens(m, k, "outliers") for _ in range(2)) if m else (torch.empty(0, k).cuda().bfloat16(),) * 2
    residual = residual.roll(1, dims=-1) * 3
    return x, residual, (torch.rand(k, device="cuda") + 0.5).bfloat16()


def float64_norm(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return t * (t.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_rmsnorm(m: int, k: int, fmt: str, zero_centred: bool) -> None:
    x, before, weight = norm_inputs(m, k)
    factor = 1 + weight.double() if zero_centred else weight

    def with_residual(fmt: str, **options: Any) -> Results:
        residual = before.clone()
        results = activations.rmsnorm(x, weight, EPS, fmt, zero_centred=zero_centred, residual=residual, **options)
        same(residual, x + before)
        return results

    def without(fmt: str, **options: Any) -> Results:
        return activations.rmsnorm(x, weight, EPS, fmt, zero_centred=zero_centred, **options)

    check_rows(with_residual, float64_norm(x.double() + before.double(), factor), fmt)
    check_rows(without, float64_norm(x.double(), factor), fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_silu_mul(m: int, k: int, fmt: str) -> None:
    torch.manual_seed(m + k)
    gate_up = (torch.randn(m, 2 * k, device="cuda") * 6).bfloat16()
    gate_up[m // 2 :: 7] = 0
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate / (1 + torch.exp(-gate)) * up
    check_rows(lambda fmt, **options: activations.silu_mul(gate_up, fmt, **options), exact, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_gelu_mul(m: int, k: int, fmt: str) -> None:
    torch.manual_seed(m + k)
    gate_up = (torch.randn(m, 2 * k, device="cuda") * 1.5).bfloat16()
    gate_up[m // 2 :: 7] = 0
    gate, up = gate_up.double().chunk(2, dim=-1)
    # as 1 + tanh(u), which float64 has nothing left of below u = -18
    u = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    exact = gate / (1 + torch.exp(-2 * u)) * up
    check_rows(lambda fmt, **options: activations.gelu_mul(gate_up, fmt, **options), exact, fmt, error=2**-15)


def test_gelu_of_extreme_gates() -> None:
    gate = torch.tensor([-3e38, -200.0, -30.0, -0.0, 0.0, 30.0, 200.0, 3e38] * 2, device="cuda")
    (got,) = kept_rows(activations.gelu_mul, torch.cat([gate, torch.ones_like(gate)]).bfloat16()[None])
    same(got, torch.where(gate < -20, -0.0, gate).bfloat16())  # e^(-2u) overflows below, and is lost above


def test_silu_of_extreme_gates() -> None:
    gate = torch.tensor([-3e38, -200.0, -100.0, -0.0, 0.0, 50.0, 100.0, 3e38] * 2, device="cuda")
    (got,) = kept_rows(activations.silu_mul, torch.cat([gate, torch.ones_like(gate)]).bfloat16()[None])
    same(got, torch.where(gate < -88, -0.0, gate / (1 + torch.exp(-gate))).bfloat16())  # where e^-gate overflows, zero


def kept_rows(produce: Produce, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """The BF16 rows [M, K] that ``produce`` quantises."""
    m, k = x.shape[0], x.shape[1] // (2 if produce in (activations.silu_mul, activations.gelu_mul) else 1)
    kept = torch.full((m, k), math.nan, dtype=torch.bfloat16, device="cuda")
    produce(x, *args, "qdq", slots=torch.arange(m, dtype=torch.int32, device="cuda"), kept=kept, **options)
    return kept


def rarely_differ(got: torch.Tensor, want: torch.Tensor) -> None:
    assert_rare(got != want, "BF16 values differ from SGLang's")
    assert torch.allclose(got.float(), want.float(), rtol=2**-7, atol=0)  # one BF16 step


@pytest.mark.filterwarnings("ignore")  # theirs, at import and when they compile
@pytest.mark.parametrize("kernel", ["sgl_kernel", "torch.ops.sgl_kernel"])
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (1000, 4096), (257, 3584), (257, 12288), (33, 16384)])
def test_rmsnorm_is_sglangs(m: int, k: int, kernel: str) -> None:
    """``sgl_kernel`` prefers flashinfer's norms to those of its own library."""
    sgl_kernel = pytest.importorskip("sgl_kernel")
    x, before, weight = norm_inputs(m, k)
    theirs, their_residual, plain = x.clone(), before.clone(), torch.empty_like(x)
    if kernel == "sgl_kernel":
        sgl_kernel.fused_add_rmsnorm(theirs, their_residual, weight, EPS)
        sgl_kernel.rmsnorm(x, weight, EPS, out=plain)
    else:
        torch.ops.sgl_kernel.fused_add_rmsnorm.default(theirs, their_residual, weight, EPS, False)
        torch.ops.sgl_kernel.rmsnorm.default(plain, x, weight, EPS, False)
    residual = before.clone()
    rarely_differ(kept_rows(activations.rmsnorm, x, weight, EPS, residual=residual), theirs)
    same(residual, their_residual)
    rarely_differ(kept_rows(activations.rmsnorm, x, weight, EPS), plain)


@pytest.mark.filterwarnings("ignore")  # theirs, at import and when they compile
@pytest.mark.parametrize("kernel", ["sgl_kernel", "sglang.kernels.ops.activation.activation"])
@pytest.mark.parametrize(("m", "k"), [(1, 12288), (1000, 12288), (257, 11008), (33, 27648)])
def test_silu_mul_is_sglangs(m: int, k: int, kernel: str) -> None:
    """SGLang prefers its own kernel, compiled at first use, to ``sgl_kernel``'s (srt/layers/activation.py)."""
    module = pytest.importorskip(kernel)
    torch.manual_seed(m + k)
    gate_up = (torch.randn(m, 2 * k, device="cuda") * 3).bfloat16()
    theirs = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    module.silu_and_mul(gate_up, theirs)
    rarely_differ(kept_rows(activations.silu_mul, gate_up), theirs)


@pytest.mark.filterwarnings("ignore")  # theirs, at import and when they compile
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (1000, 4096), (257, 3840), (257, 5376), (33, 2048)])
def test_zero_centred_rmsnorm_is_sglangs(m: int, k: int) -> None:
    sgl_kernel = pytest.importorskip("sgl_kernel")
    x, before, weight = norm_inputs(m, k)
    weight = weight - 1  # as Gemma's are
    theirs, their_residual, plain = x.clone(), before.clone(), torch.empty_like(x)
    sgl_kernel.gemma_fused_add_rmsnorm(theirs, their_residual, weight, EPS)
    sgl_kernel.gemma_rmsnorm(x, weight, EPS, out=plain)
    residual = before.clone()
    rarely_differ(kept_rows(activations.rmsnorm, x, weight, EPS, zero_centred=True, residual=residual), theirs)
    same(residual, their_residual)
    rarely_differ(kept_rows(activations.rmsnorm, x, weight, EPS, zero_centred=True), plain)


@pytest.mark.filterwarnings("ignore")  # theirs, at import and when they compile
@pytest.mark.parametrize("kernel", ["sgl_kernel", "sglang.kernels.ops.activation.activation"])
@pytest.mark.parametrize(("m", "k"), [(1, 15360), (1000, 15360), (257, 21504), (33, 2112)])
def test_gelu_mul_is_sglangs(m: int, k: int, kernel: str) -> None:
    """Theirs may have a hyperbolic tangent that is good to 2^-11 alone, as PTX says of ``tanh.approx.f32``."""
    module = pytest.importorskip(kernel)
    torch.manual_seed(m + k)
    gate_up = (torch.randn(m, 2 * k, device="cuda") * 1.5).bfloat16()
    theirs = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    module.gelu_tanh_and_mul(gate_up, theirs)
    ours = kept_rows(activations.gelu_mul, gate_up)
    print(f"{int((ours != theirs).sum())} of {ours.numel()} BF16 values differ from SGLang's")
    gate, up = gate_up.double().chunk(2, dim=-1)
    allowed = (gate * up).abs() * 2**-12 + theirs.double().abs() * 2**-7  # and one BF16 step
    assert ((ours.double() - theirs.double()).abs() <= allowed).all()


def producers(m: int, k: int, kind: str) -> dict[str, Callable[[slice, str], Results]]:
    """Each source, of some rows only."""
    x, gate_up, weight = tokens(m, k, kind), tokens(m, 2 * k, kind), (torch.rand(k, device="cuda") + 0.5).bfloat16()
    return {
        "quantize": lambda rows, fmt: activations.quantize(x[rows], fmt),
        "rmsnorm": lambda rows, fmt: activations.rmsnorm(x[rows], weight, EPS, fmt, residual=x.flip(0)[rows]),
        "silu_mul": lambda rows, fmt: activations.silu_mul(gate_up[rows], fmt),
        "gelu_mul": lambda rows, fmt: activations.gelu_mul(gate_up[rows], fmt),
        "zero_centred": lambda rows, fmt: activations.rmsnorm(x[rows], weight, EPS, fmt, zero_centred=True),
    }


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("m", "k"), [(300, 2560), (131, 12288)])
@pytest.mark.parametrize("kind", ["outliers", "magnitudes"])
def test_rows_are_the_same_alone_and_in_company(m: int, k: int, kind: str, fmt: str) -> None:
    def linear(results: Results, rows: int) -> Results:
        if fmt != "nvfp4":
            return results
        return results[0], scale_layout.unswizzle_scales(results[1], rows, k), results[2]

    for produce in producers(m, k, kind).values():
        together = linear(produce(slice(None), fmt), m)
        for i in (0, 2, m // 2, m - 1):
            all_same(linear(produce(slice(i, i + 1), fmt), 1), tuple(one[i : i + 1] for one in together))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("fmt", FORMATS)
def test_they_neither_synchronise_nor_break_a_graph(fmt: str) -> None:
    m, k = 9, 256
    x, gate_up, residual = tokens(m, k, "gaussian"), tokens(m, 2 * k, "gaussian"), tokens(m, k, "ties")
    weight = torch.ones(k, dtype=torch.bfloat16, device="cuda")
    slots = torch.tensor([-1, 1, -1, -1, 0, -1, -1, -1, -1], dtype=torch.int32, device="cuda")
    kept = torch.zeros(3, 3, k, dtype=torch.bfloat16, device="cuda")

    def passes() -> Results:
        kept.fill_(7)
        t = residual.clone()
        return (
            *activations.quantize(x, fmt, slots=slots, kept=kept[0]),
            *activations.rmsnorm(x, weight, EPS, fmt, residual=t, slots=slots, kept=kept[1]),
            *activations.silu_mul(gate_up, fmt, slots=slots, kept=kept[2]),
            t,
        )

    passes()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = passes()
    x.copy_(tokens(m, k, "outliers"))
    gate_up.copy_(tokens(m, 2 * k, "outliers"))
    slots.copy_(torch.tensor([2, -1, -1, -1, -1, -1, 0, -1, -1], dtype=torch.int32, device="cuda"))
    for tensor in results:
        tensor.view(torch.uint8).fill_(0xFF)
    graph.replay()
    replayed, replayed_kept = tuple(tensor.clone() for tensor in results), kept.clone()
    all_same(replayed, passes())
    same(replayed_kept, kept)
    same(kept[0], torch.stack([x[6], torch.full_like(x[0], 7), x[0]]))
