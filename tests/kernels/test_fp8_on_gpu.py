"""SGLang's FP8 kernels as we call them: the codes are the oracle's, and no row's depend on its neighbours."""

from __future__ import annotations

import pytest
import torch

from mixquant_sglang.formats import fp8
from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8
from mixquant_sglang.kernels.linear.native_fp8 import NativeFP8

pytestmark = pytest.mark.gpu


def codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import sgl_kernel

    data = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_full((x.shape[0], 1), torch.nan, dtype=torch.float32)
    sgl_kernel.sgl_per_token_quant_fp8(x, data, scales)
    return data.view(torch.uint8), scales[:, 0]


def sample(m: int, k: int) -> torch.Tensor:
    torch.manual_seed(m + k)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    x[:, ::37] *= 300  # outlier channels
    if m > 1:
        x[m // 2] = 0
    return x


@pytest.mark.parametrize(("m", "k"), [(1, 64), (7, 4096), (130, 12288), (33, 11008)])
def test_codes_and_scales_of_a_row_are_the_same_alone_and_in_company(m: int, k: int) -> None:
    x = sample(m, k)
    crowd = torch.cat([x, 1e4 * torch.randn(257, k, dtype=x.dtype, device="cuda")])
    for alone, together in zip(codes(x), codes(crowd), strict=True):
        assert torch.equal(alone, together[:m])
    data, scales = codes(x)
    for i in (0, m - 1):
        one = codes(x[i : i + 1])
        assert torch.equal(one[0][0], data[i]) and torch.equal(one[1][0], scales[i])


@pytest.mark.parametrize(("m", "k"), [(7, 4096), (130, 12288)])
def test_codes_and_scales_are_those_of_the_oracle(m: int, k: int) -> None:
    x = sample(m, k)
    live = [i for i in range(m) if x[i].any()]  # the scale of an all-zero row means nothing
    oracle = fp8.quantize_activations(x)
    data, scales = codes(x)
    # sgl_kernel's SM90 build divides with -use_fast_math, so its scales may be off by their last bit.
    assert torch.allclose(scales[live], oracle.scales[live], rtol=2**-22, atol=0)
    differ = (data[live] != oracle.data.view(torch.uint8)[live]).float().mean()
    print(f"codes that differ from the oracle: {float(differ):.2e}")
    assert float(differ) < 1e-3


@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (40, 6144, 4096), (300, 4096, 12288)])
def test_gemm_against_float64_of_the_same_codes(m: int, n: int, k: int) -> None:
    x = sample(m, k)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    packed = NativeFP8(weight, scales="search")
    data, scales = codes(x)
    reference = data.view(torch.float8_e4m3fn).double() @ packed.tensors()[0].double().t()
    reference = reference * scales.double()[:, None] * packed.tensors()[1].double() + bias.double()
    out = packed.matmul(x, bias).double()
    error = float((out - reference).norm() / reference.norm())
    print(f"relative error of the GEMM {error:.2e}")
    assert error < 4e-3  # BF16 rounding of the output is 1.7e-3; the rest is FP8 accumulation


@pytest.mark.parametrize(("m", "n", "k"), [(0, 64, 64), (1, 4096, 4096), (33, 96, 12288), (300, 6144, 4096)])
def test_emulated_against_float64(m: int, n: int, k: int) -> None:
    """The E4M3 codes are exact in BF16, so what is left is FP32 accumulation and one rounding to BF16."""
    x = sample(m, k) if m else torch.empty(0, k, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
    got = EmulatedFP8(weight).matmul(x, None)
    a, w = fp8.quantize_activations(x), fp8.quantize(weight)
    a64, w64 = a.data.double() * a.scales.double()[:, None], w.data.double() * w.scales.double()[:, None]
    exact, size = a64 @ w64.t(), a64.abs() @ w64.abs().t()
    assert got.shape == (m, n) and got.dtype is torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + size * 2**-16).all()
