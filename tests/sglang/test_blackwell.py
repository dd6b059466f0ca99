"""The native NVFP4 path up to the GEMM, without a Blackwell GPU.

SGLang's own FP4 linear method runs for real: it creates, pads and swizzles.  Only its last two calls, FlashInfer's
quantiser and GEMM, are replaced, by stand-ins that take exactly the bytes, layouts and scales of the real ones.
"""

from __future__ import annotations

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
    shadow = NativeNVFP4(weight, scales="search")._shadow
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
