"""The native NVFP4 path up to the GEMM, without a Blackwell GPU.

SGLang's own FP4 linear method runs for real: it creates, pads and swizzles.  Only its last two calls, FlashInfer's
quantiser and GEMM, are replaced, by stand-ins that take exactly the bytes, layouts and scales of the real ones.  Tests
that take ``quantizer`` run twice: with activations that our quantiser made, and with SGLang's calling FlashInfer's.
"""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.quantization import modelopt_quant

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4, scale_layout
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels import operands as quantized
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.kernels.linear.native_nvfp4 import NativeNVFP4
from mixquant_sglang.kernels.registry import refusal
from mixquant_sglang.kernels.rows import EagerRows
from mixquant_sglang.kernels.tuning import fp4_gemm
from mixquant_sglang.kernels.verify import ROWS, TOLERANCE, Pair, activations, verify
from mixquant_sglang.passes.running import Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.versions import fp4
from tests.support.blackwell import CALLS, gemm, install

SHAPES = [(128, 64), (96, 48), (40, 80), (256, 256)]  # with and without padding of N to 32 and K to 32


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
    install(monkeypatch.setattr)
    CALLS.clear()


@pytest.fixture(params=["ours", "flashinfer"])
def quantizer(request: pytest.FixtureRequest, stand_ins: None) -> str:
    return str(request.param)


def native_linear(weight: torch.Tensor, quantizer: str = "ours", **options: Any) -> NativeNVFP4:
    environment = fp4.environment(own_quantizer=quantizer == "ours")
    return NativeNVFP4(weight, environment=environment, **options)


def tokens(m: int, k: int) -> torch.Tensor:
    """Rows of very different magnitude, zero blocks, and a row of zeros."""
    x = torch.randn(m, k, dtype=torch.bfloat16) * torch.logspace(-20, 20, m)[:, None].to(torch.bfloat16)
    x[:, 16:32] = 0
    x[1 : m // 2 : 50] = 0
    return x


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 5, 130])
def test_native_gives_the_numbers_of_the_emulated_kernel(m: int, n: int, k: int, quantizer: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.03
    x, bias = tokens(m, k), torch.randn(n, dtype=torch.bfloat16)
    native, emulated = native_linear(weight, quantizer, scales="search"), EmulatedNVFP4(weight, scales="search")
    assert torch.equal(native.matmul(x, None), emulated.matmul(x, None))
    assert torch.equal(native.matmul(x, bias), emulated.matmul(x, bias))
    assert set(CALLS) == ({"fp4_gemm"} if quantizer == "ours" else {"fp4_quantize", "fp4_gemm"})
    assert native.matmul(x[:0], bias).shape == (0, n)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_rows_do_not_depend_on_each_other(n: int, k: int, quantizer: str) -> None:
    torch.manual_seed(0)
    native, x = native_linear(torch.randn(n, k, dtype=torch.bfloat16), quantizer), tokens(9, k)
    together = native.matmul(x, None)
    for i in range(9):
        assert torch.equal(native.matmul(x[i : i + 1], None)[0], together[i])
    if quantizer == "flashinfer":
        return  # what it makes of NaN is its own affair
    x[4, 3], x[6, 1] = torch.nan, -torch.inf
    poisoned = native.matmul(x, None)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(poisoned[others], together[others]) and bool(poisoned[[4, 6]].isnan().all())


@pytest.mark.parametrize("k", [64, 48, 80])
def test_the_activations_that_the_gemm_reads(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Both quantisers hand over the same bytes: codes padded as the weight is, and swizzled scales."""
    read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(x: torch.Tensor, w: torch.Tensor, xs: torch.Tensor, *rest: object) -> torch.Tensor:
        read.append((x, xs))
        return gemm(x, w, xs, *rest)

    monkeypatch.setattr(modelopt_quant, "fp4_gemm", spy)
    weight, x = torch.randn(96, k, dtype=torch.bfloat16), tokens(130, k)
    for quantizer in ("ours", "flashinfer"):
        native_linear(weight, quantizer).matmul(x, None)
    (ours, our_scales), (theirs, their_scales) = read
    expected = nvfp4.quantize_activations(x)
    assert torch.equal(ours, theirs) and torch.equal(our_scales, their_scales)
    assert torch.equal(ours[:, : k // 2], expected.packed) and not ours[:, k // 2 :].any()
    linear = scale_layout.unswizzle_scales(our_scales, 130, k)
    assert torch.equal(linear, expected.block_scales.view(torch.uint8))


@pytest.mark.parametrize(("n", "k"), [(1, 16), (128, 64), (129, 80), (200, 2048), (257, 48)])
def test_swizzle_is_sglangs(n: int, k: int) -> None:
    from sglang.srt.layers.quantization.utils import swizzle_blockscale

    scales = torch.randint(1, 127, (n, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    theirs = swizzle_blockscale(scales)
    assert torch.equal(scale_layout.swizzle_scales(scales).view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(scale_layout.unswizzle_scales(theirs, n, k).view(torch.uint8), scales.view(torch.uint8))


def test_some_rows_of_an_operand() -> None:
    """What the last layer reads (layers/last_layer.py); -1 in a captured graph gives rows that nobody reads."""
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 80, dtype=torch.bfloat16), torch.randn(96, dtype=torch.bfloat16)
    native, x = native_linear(weight), tokens(300, 80)
    rows = EagerRows(300, ((3, 4), (129, 260), (299, 300)), x.device)
    operand = quantized.gather(quantized.quantize(x, "nvfp4"), rows)
    again = quantized.quantize(x[rows.index], "nvfp4").operand
    for part, expected in zip(operand, again, strict=True):
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(native.multiply(operand, bias), native.matmul(x, bias)[rows.index])


def test_the_linear_method_runs_it() -> None:
    """Fused or not, protected rows and the rows that are read, as with the emulated kernel."""
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    asked = recipe.load("nvfp4-emulated")
    rows = EagerRows(9, ((3, 4), (8, 9)), torch.device("cpu"))
    x, results = tokens(9, 80), []
    for kernel in ("native", "emulated"):
        run = Runtime(asked, Selection("nvfp4", "bf16", {"nvfp4": kernel}, ""), environment=fp4.environment())
        method, layer = MixQuantLinearMethod(run, "down_proj", "nvfp4", "bf16"), torch.nn.Module()
        method.create_weights(layer, 80, [96], 80, 96, torch.bfloat16, weight_loader=None)
        torch.manual_seed(0)
        layer.weight.data = torch.randn(96, 80, dtype=torch.bfloat16)
        method.process_weights_after_loading(layer)
        with scope(Pass(Role.PROMPT, rows)):
            fmt, kept = method.fusable(9)
            fused = quantized.quantize(x, fmt, kept)
            both = [method.apply(layer, x), method.apply(layer, fused)]
        method.unread = torch.zeros
        with scope(Pass(Role.PROMPT, rows, EagerRows(9, ((3, 4), (6, 9)), x.device))):
            both += [method.apply(layer, x), method.apply(layer, fused)]
        assert torch.equal(both[0], both[1]) and torch.equal(both[2], both[3])
        results.append(both)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_bytes_that_the_gemm_reads(n: int, k: int) -> None:
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    packed = nvfp4.quantize(weight, scales="search")
    shadow = native_linear(weight, scales="search")._shadows[0]
    rows, columns = -(-n // 32) * 32, -(-k // 32) * 32 // 2
    assert shadow.weight.shape == (rows, columns) and shadow.weight.dtype == torch.uint8
    assert torch.equal(shadow.weight[:n, : k // 2], packed.packed)
    assert not shadow.weight[n:].any() and not shadow.weight[:, k // 2 :].any()
    swizzled = shadow.weight_scale_interleaved
    assert torch.equal(
        scale_layout.unswizzle_scales(swizzled, n, k).view(torch.uint8), packed.block_scales.view(torch.uint8)
    )
    assert float(shadow.alpha) == float(packed.tensor_scale) and float(shadow.input_scale_inv) == 1.0


def test_refresh_keeps_addresses(quantizer: str) -> None:
    weight = torch.randn(96, 48, dtype=torch.bfloat16)
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    native = native_linear(weight, quantizer, scales="absmax")
    before = [t.data_ptr() for t in native.tensors()]
    native.refresh(weight * 2)
    assert [t.data_ptr() for t in native.tensors()] == before
    assert torch.equal(native.matmul(x, None), native_linear(weight * 2, quantizer, scales="absmax").matmul(x, None))


def test_marlin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    marlin = SimpleNamespace(is_marlin=lambda: True)
    monkeypatch.setattr("sglang.srt.layers.quantization.fp4_utils.get_fp4_gemm_runner_backend", lambda: marlin)
    with pytest.raises(MixQuantError, match="--fp4-gemm-backend marlin"):
        fp4.environment()


def test_nothing_is_packed_without_sglangs_method() -> None:
    with pytest.raises(MixQuantError, match="SGLang's FP4 linear method, which was not provided"):
        NativeNVFP4(torch.randn(96, 48, dtype=torch.bfloat16))


def test_odd_k_is_refused_by_shape() -> None:
    assert refusal("nvfp4", "native", 64, 24) == "K = 24 is not a multiple of the block size 16"


# Ready-made weights


def test_parts_with_scales_of_their_own(quantizer: str) -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(n, 80, dtype=torch.bfloat16) * 4**i for i, n in enumerate((96, 40, 8))])
    ready = [nvfp4.quantize(part, scales="absmax") for part in weight.split([96, 40, 8])]
    native, emulated = native_linear(weight, quantizer, ready=ready), EmulatedNVFP4(weight, ready=ready)
    x, bias = torch.randn(5, 80, dtype=torch.bfloat16), torch.randn(144, dtype=torch.bfloat16)
    assert torch.equal(native.matmul(x, bias), emulated.matmul(x, bias))
    assert native.matmul(x[:0], bias).shape == (0, 144)
    assert native.nbytes == sum(
        native_linear(part, quantizer, scales="absmax").nbytes for part in weight.split([96, 40, 8])
    )
    before, expected = [t.data_ptr() for t in native.tensors()], native.matmul(x, None)
    for tensor in native.tensors():
        tensor.data.fill_(0)
    native.replace(ready)
    assert [t.data_ptr() for t in native.tensors()] == before and torch.equal(native.matmul(x, None), expected)


# The check at load


def pair(n: int = 96, k: int = 80, quantizer: str = "ours") -> Pair:
    torch.manual_seed(1)
    weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.03
    return Pair("model.layers.0.x", n, k, native_linear(weight, quantizer), EmulatedNVFP4(weight))


@pytest.mark.parametrize("m", ROWS)
def test_quantising_does_not_change_the_activations(m: int) -> None:
    x = activations(m, 320)
    assert torch.equal(nvfp4.quantize_activations(x).dequantize(), x)
    assert x.unique().numel() > 100 and torch.equal(x, activations(m, 320))


def test_kernels_that_agree(quantizer: str) -> None:
    count, worst = verify([pair(quantizer=quantizer), pair(128, 64, quantizer)], torch.device("cpu"))
    assert count == 2 and worst < TOLERANCE / 4
    assert verify([], torch.device("cpu")) == (0, 0.0)


def test_another_order_of_summation_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelopt_quant, "fp4_gemm", lambda x, w, xs, ws, a, *rest: gemm(x, w, xs, ws, a, *rest) * 1.001)
    assert verify([pair()], torch.device("cpu"))[1] < TOLERANCE


def linear_scales(scales: torch.Tensor) -> torch.Tensor:
    """What a kernel that expects row-major scales would make of swizzled ones, and the other way round."""
    flat = scales.contiguous().view(torch.uint8).flatten()
    return flat.roll(4).view(scales.dtype).view(scales.shape)


WRONG = {
    "swizzle": lambda x, w, xs, ws, a, *rest: gemm(x, w, xs, linear_scales(ws.T).T, a, *rest),
    "swizzle of the activations": lambda x, w, xs, ws, a, *rest: gemm(x, w, linear_scales(xs), ws, a, *rest),
    "alpha": lambda x, w, xs, ws, a, *rest: gemm(x, w, xs, ws, a * 1.01, *rest),
    "no alpha": lambda x, w, xs, ws, a, *rest: gemm(x, w, xs, ws, torch.ones_like(a), *rest),
    "inverse alpha": lambda x, w, xs, ws, a, *rest: gemm(x, w, xs, ws, 1 / a, *rest),
    "nibbles": lambda x, w, xs, ws, a, *rest: gemm(x, (w << 4) | (w >> 4), xs, ws, a, *rest),
    "nothing written": lambda x, w, xs, ws, a, dtype, n: torch.full((x.shape[0], n), torch.nan, dtype=dtype),
    "zeros": lambda x, w, xs, ws, a, dtype, n: torch.zeros((x.shape[0], n), dtype=dtype),
    "the last row": lambda x, w, xs, ws, a, *rest: torch.cat(
        [gemm(x, w, xs, ws, a, *rest)[:-1], torch.zeros(1, rest[1], dtype=rest[0])]
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_kernels_that_disagree(monkeypatch: pytest.MonkeyPatch, wrong: object, quantizer: str) -> None:
    monkeypatch.setattr(modelopt_quant, "fp4_gemm", wrong)
    message = (
        r"native nvfp4 and the emulated kernel disagree on model\.layers\.0\.x, \[96, 80\] with 16 rows: relative "
        r"error \S+, allowed 0\.00391; choose another --fp4-gemm-backend, or 'kernel: emulated' in a recipe; 'verify"
    )
    with pytest.raises(MixQuantError) as caught:
        verify([pair(quantizer=quantizer)], torch.device("cpu"))
    assert re.match(message, str(caught.value))


# The GEMMs that FlashInfer measures at start


class Measuring:
    """Stands for SGLang's context; notes which GEMMs run within, by their operands' shapes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.ran, self.too_large = False, [], torch.inf
        monkeypatch.setattr(modelopt_quant, "fp4_gemm", self.gemm)

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *_: object) -> None:
        self.open = False

    def gemm(self, x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        assert self.open
        if x.shape[0] > self.too_large:
            raise torch.OutOfMemoryError
        self.ran.append((x.shape[0], weight.shape[1], 2 * x.shape[1]))
        return torch.zeros(x.shape[0], weight.shape[1], dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("most", "rows"),
    [(1, [256]), (256, [256]), (257, [256, 512]), (8192, [256, 512, 1024, 2048, 4096, 8192])],
)
def test_row_counts_that_are_measured(most: int, rows: list[int]) -> None:
    assert fp4_gemm.buckets(most) == rows


@pytest.mark.parametrize("most", [256, 300, 5000, 8192, 10000])
def test_flashinfer_then_knows_every_row_count(most: int) -> None:
    """One run in a measuring context measures every bucket up to its rows; later calls look for ``map``'s."""
    from flashinfer.fused_moe.utils import get_hybrid_num_tokens_buckets, map_to_hybrid_bucket_uncapped

    measured = {m for rows in fp4_gemm.buckets(most) for m in get_hybrid_num_tokens_buckets(rows)}
    assert {map_to_hybrid_bucket_uncapped(m) for m in range(1, most + 1)} <= measured


def test_each_shape_is_measured_once_for_each_row_count(monkeypatch: pytest.MonkeyPatch, quantizer: str) -> None:
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for n, k in ((64, 32), (64, 32), (40, 80))]
    linears = [native_linear(weight, quantizer) for weight in weights]
    ready = [nvfp4.quantize(part) for part in weights[0].split([32, 32])]
    linears += [native_linear(weights[0], quantizer, ready=ready), EmulatedNVFP4(weights[0])]
    measuring = Measuring(monkeypatch)
    state = torch.get_rng_state()
    tuned = fp4_gemm.tune(linears, 700, measuring)
    shapes = [(64, 32), (64, 96), (32, 32), (32, 32)]
    assert sorted(measuring.ran) == sorted((m, *shape) for shape in shapes for m in (256, 512, 1024))
    assert torch.equal(torch.get_rng_state(), state)
    assert re.fullmatch(r"FlashInfer chose FP4 GEMMs for 3 shapes and up to 1024 rows in \d+\.\d s", str(tuned))


def test_too_little_memory_to_measure(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    linears = [native_linear(torch.randn(n, 32, dtype=torch.bfloat16)) for n in (64, 96)]
    measuring = Measuring(monkeypatch)
    measuring.too_large = 256
    fp4_gemm.tune(linears, 512, measuring)
    assert measuring.ran == [(256, 64, 32), (256, 96, 32)]
    assert [r.getMessage() for r in caplog.records if r.name == fp4_gemm.__name__] == [
        f"mixquant: FP4 GEMM (({n}, 32),): too little memory to tune it with 512 rows" for n in (64, 96)
    ]


def runner(**changes: bool) -> SimpleNamespace:
    args = {"disable_flashinfer_autotune": False, "enable_deterministic_inference": False, **changes}
    return SimpleNamespace(server_args=SimpleNamespace(**args))


def test_sglang_measures_where_it_is_to() -> None:
    from sglang.srt.model_executor.runner import flashinfer_autotune
    from sglang.srt.server_args import ServerArgs

    assert all(hasattr(ServerArgs, name) for name in vars(runner().server_args))
    assert fp4.fp4_gemm_measuring(runner(disable_flashinfer_autotune=True)) is None
    assert fp4.fp4_gemm_measuring(runner(enable_deterministic_inference=True)) is None
    context = fp4.fp4_gemm_measuring(runner())  # SGLang's own; not entered without a GPU
    assert context is not None and hasattr(context, "__enter__")
    signature = inspect.signature(flashinfer_autotune.flashinfer_autotune_context)
    assert len(signature.parameters) == 2  # the runner, and what to do with logits
