"""The emulated NVFP4 linear against float64 of the same codes and scales, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch

from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.kernels.registry import refusal

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
SHAPES = [(0, 96, 64), (1, 1, 16), (3, 7, 48), (17, 33, 1040), (130, 259, 4096), (5, 512, 12288)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scales", nvfp4.SCALE_MODES)
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "zero"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_against_float64(m: int, n: int, k: int, kind: str, scales: str, device: str) -> None:
    torch.manual_seed(m + n + k)
    x, weight = torch.randn(m, k), torch.randn(n, k) * 0.05
    if kind == "heavy":
        x, weight = x**5, weight * torch.randn(n, k) ** 4
    if kind == "zero":
        x[::2], weight[::3] = 0, 0
    x, weight = x.bfloat16().to(device), weight.bfloat16().to(device)
    bias = torch.randn(n, dtype=torch.bfloat16, device=device)
    packed = EmulatedNVFP4(weight, scales=scales)
    got, with_bias = packed.matmul(x, None), packed.matmul(x, bias)
    assert got.shape == (m, n) and got.dtype is torch.bfloat16

    quantised = nvfp4.quantize(weight, scales=scales)
    wq = quantised.unscaled(torch.float64) * quantised.tensor_scale.double()
    xq = nvfp4.quantize_activations(x).dequantize().double()
    want = xq @ wq.t()
    # One rounding to BF16, which has 8 bits: 2^-8 of the value. A step of an FP32 sum may lose 2^-23 of the sum so far,
    # in tensor cores by cutting it off; K/16 steps of sums growing with the root of K lose 2^-20 of all terms. Times 4.
    bound = want.abs() * 2**-8 + (xq.abs() @ wq.abs().t()) * 2**-18
    assert bool(((got.double() - want).abs() <= bound).all())
    assert torch.equal(with_bias, got + bias)


@pytest.mark.parametrize(("precision", "kernel"), [("fp8", "emulated"), ("fp8", "native"), ("nvfp4", "emulated")])
@pytest.mark.parametrize("k", [8, 24, 40, 4100])
def test_a_width_that_the_kernel_of_few_rows_refuses_is_refused_at_load(precision: str, kernel: str, k: int) -> None:
    """In the first prefill it would be a ValueError in a scheduler (few_rows.py)."""
    assert f"{k}" in (refusal(precision, kernel, 64, k) or "")
    assert refusal(precision, kernel, 64, k // 16 * 16 + 16) is None
