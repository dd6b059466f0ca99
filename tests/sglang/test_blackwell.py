"""The native NVFP4 path up to the GEMM, without a Blackwell GPU.

SGLang's own FP4 linear method runs for real: it creates, pads and swizzles.  Only its last two calls, FlashInfer's
quantiser and GEMM, are replaced, by stand-ins that take exactly the bytes, layouts and scales of the real ones.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization import modelopt_quant

from mixquant_sglang import compat
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels import blackwell
from mixquant_sglang.kernels.blackwell import NativeNVFP4
from mixquant_sglang.kernels.emulated import EmulatedNVFP4
from mixquant_sglang.kernels.verify import ROWS, TOLERANCE, Pair, activations, verify

SHAPES = [(128, 64), (96, 48), (40, 80), (256, 256)]  # with and without padding of N to 32 and K to 32


def quantizer(x: torch.Tensor, global_scale: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's ``fp4_quantize``: codes [M, K/2], and block scales swizzled 128x4; ``global_scale`` encodes."""
    packed = nvfp4.quantize(x, scales="absmax", tensor_scale=float(1 / global_scale))
    return packed.packed, packed.swizzled_scales()


def gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scales: torch.Tensor,
    weight_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
    n: int,
) -> torch.Tensor:
    """FlashInfer's ``mm_fp4`` as SGLang calls it: transposed weight and scales, alpha on the FP32 sum."""
    assert weight.shape == (x.shape[1], n) and weight_scales.dtype == x_scales.dtype == torch.float8_e4m3fn
    k = 2 * x.shape[1]

    def read(codes: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
        linear = nvfp4.unswizzle_scales(scales.contiguous(), rows, k)
        one = torch.ones((), dtype=torch.float32)
        return nvfp4.NVFP4Tensor(codes.contiguous(), linear, one).unscaled(torch.float32)

    total = read(x, x_scales, x.shape[0]) @ read(weight.T, weight_scales.T, n).T
    return (total * alpha).to(dtype)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(
        is_marlin=lambda: False, is_flashinfer_trtllm=lambda: False, is_flashinfer_cutedsl=lambda: False
    )
    monkeypatch.setattr(modelopt_quant, "get_fp4_gemm_runner_backend", lambda: backend)
    if hasattr(modelopt_quant, "is_blackwell_supported"):
        monkeypatch.setattr(modelopt_quant, "is_blackwell_supported", lambda: True)
    if hasattr(modelopt_quant, "get_platform"):
        monkeypatch.setattr(modelopt_quant, "get_platform", lambda: SimpleNamespace(is_blackwell=True))
    monkeypatch.setattr(modelopt_quant, "enable_flashinfer_fp4_gemm", True)
    monkeypatch.setattr(modelopt_quant, "fp4_quantize", quantizer)
    monkeypatch.setattr(modelopt_quant, "fp4_gemm", gemm)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr("sglang.srt.layers.quantization.fp4_utils.get_fp4_gemm_runner_backend", lambda: backend)
    monkeypatch.setattr(blackwell, "fp4_linear_method", None)
    monkeypatch.setenv("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
    compat.provide_fp4_linear_method()


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 5, 130])
def test_native_gives_the_numbers_of_the_emulated_kernel(m: int, n: int, k: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.03
    x = torch.randn(m, k, dtype=torch.bfloat16) * torch.logspace(-3, 3, m)[:, None].to(torch.bfloat16)
    bias = torch.randn(n, dtype=torch.bfloat16)
    native, emulated = NativeNVFP4(weight, scales="search"), EmulatedNVFP4(weight, scales="search")
    assert torch.equal(native.matmul(x, None), emulated.matmul(x, None))
    assert torch.equal(native.matmul(x, bias), emulated.matmul(x, bias))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_bytes_that_the_gemm_reads(n: int, k: int) -> None:
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    packed = nvfp4.quantize(weight, scales="search")
    shadow = NativeNVFP4(weight, scales="search")._shadows[0]
    rows, columns = -(-n // 32) * 32, -(-k // 32) * 32 // 2
    assert shadow.weight.shape == (rows, columns) and shadow.weight.dtype == torch.uint8
    assert torch.equal(shadow.weight[:n, : k // 2], packed.packed)
    assert not shadow.weight[n:].any() and not shadow.weight[:, k // 2 :].any()
    swizzled = shadow.weight_scale_interleaved
    assert torch.equal(nvfp4.unswizzle_scales(swizzled, n, k).view(torch.uint8), packed.block_scales.view(torch.uint8))
    assert float(shadow.alpha) == float(packed.tensor_scale) and float(shadow.input_scale_inv) == 1.0


def test_refresh_keeps_addresses() -> None:
    weight = torch.randn(96, 48, dtype=torch.bfloat16)
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    native = NativeNVFP4(weight, scales="absmax")
    before = [t.data_ptr() for t in native.tensors()]
    assert native.refresh(weight * 2)
    assert [t.data_ptr() for t in native.tensors()] == before
    assert torch.equal(native.matmul(x, None), NativeNVFP4(weight * 2, scales="absmax").matmul(x, None))


def test_marlin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    marlin = SimpleNamespace(is_marlin=lambda: True)
    monkeypatch.setattr("sglang.srt.layers.quantization.fp4_utils.get_fp4_gemm_runner_backend", lambda: marlin)
    with pytest.raises(MixQuantError, match="--fp4-gemm-backend marlin"):
        compat.provide_fp4_linear_method()


def test_odd_k_is_refused_by_shape() -> None:
    assert NativeNVFP4.refusal(64, 24) == "K = 24 is not a multiple of the block size 16"


# Ready-made weights


def test_parts_with_scales_of_their_own() -> None:
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(n, 80, dtype=torch.bfloat16) * 4**i for i, n in enumerate((96, 40, 8))])
    ready = [nvfp4.quantize(part, scales="absmax") for part in weight.split([96, 40, 8])]
    native, emulated = NativeNVFP4(weight, ready=ready), EmulatedNVFP4(weight, ready=ready)
    x, bias = torch.randn(5, 80, dtype=torch.bfloat16), torch.randn(144, dtype=torch.bfloat16)
    assert torch.equal(native.matmul(x, bias), emulated.matmul(x, bias))
    assert native.matmul(x[:0], bias).shape == (0, 144)
    assert native.nbytes == sum(NativeNVFP4(part, scales="absmax").nbytes for part in weight.split([96, 40, 8]))
    before, expected = [t.data_ptr() for t in native.tensors()], native.matmul(x, None)
    for tensor in native.tensors():
        tensor.data.fill_(0)
    native.replace(ready)
    assert [t.data_ptr() for t in native.tensors()] == before and torch.equal(native.matmul(x, None), expected)


# The check at load


def pair(n: int = 96, k: int = 80) -> Pair:
    torch.manual_seed(1)
    weight = torch.randn(n, k, dtype=torch.bfloat16) * 0.03
    return Pair("model.layers.0.x", n, k, NativeNVFP4(weight), EmulatedNVFP4(weight))


@pytest.mark.parametrize("m", ROWS)
def test_quantising_does_not_change_the_activations(m: int) -> None:
    x = activations(m, 320)
    assert torch.equal(nvfp4.quantize_activations(x).dequantize(), x)
    assert x.unique().numel() > 100 and torch.equal(x, activations(m, 320))


def test_kernels_that_agree() -> None:
    count, worst = verify([pair(), pair(128, 64)], torch.device("cpu"))
    assert count == 2 and worst < TOLERANCE / 4
    assert verify([], torch.device("cpu")) == (0, 0.0)


def test_another_order_of_summation_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelopt_quant, "fp4_gemm", lambda x, w, xs, ws, a, *rest: gemm(x, w, xs, ws, a, *rest) * 1.001)
    assert verify([pair()], torch.device("cpu"))[1] < TOLERANCE


def linear_scales(scales: torch.Tensor) -> torch.Tensor:
    """What a kernel that expects row-major scales would make of swizzled ones, and the other way round."""
    flat = scales.contiguous().view(torch.uint8).flatten()
    return flat.roll(4).view(torch.float8_e4m3fn).view(scales.shape)


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
def test_kernels_that_disagree(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    monkeypatch.setattr(modelopt_quant, "fp4_gemm", wrong)
    message = (
        r"native nvfp4 and the emulated kernel disagree on model\.layers\.0\.x, \[96, 80\] with 16 rows: relative "
        r"error \S+, allowed 0\.00391; choose another --fp4-gemm-backend, or 'kernel: emulated' in a recipe; 'verify"
    )
    with pytest.raises(MixQuantError) as caught:
        verify([pair()], torch.device("cpu"))
    assert re.match(message, str(caught.value))
