"""W8A16 and W4A16 on the CPU: the numbers of ``formats/``, on the memory of the kernel that packed."""

from __future__ import annotations

import pytest
import torch

from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels import registry
from mixquant_sglang.kernels.linear.base import PackedLinear
from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.kernels.linear.w4a16 import EmulatedW4A16
from mixquant_sglang.kernels.linear.w8a16 import EmulatedW8A16
from mixquant_sglang.kernels.linear.weight_only import WeightOnly

KINDS: dict[str, tuple[type[WeightOnly], type[PackedLinear]]] = {
    "w8a16": (EmulatedW8A16, EmulatedFP8),
    "w4a16": (EmulatedW4A16, EmulatedNVFP4),
}


def values(base: PackedLinear) -> torch.Tensor:
    """The weight [N, K] in float64."""
    if isinstance(base, EmulatedNVFP4):
        parts = [p.unscaled(torch.float64) * p.tensor_scale.double() for p in base.parts]
        return torch.cat(parts)
    codes, scales = base.tensors()
    return codes.double() * scales[:, None].double()


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 48, 64), (1, 48, 64), (7, 40, 48), (130, 96, 1040), (2050, 16, 16)])
def test_the_numbers_are_those_of_the_packed_weights(precision: str, m: int, n: int, k: int) -> None:
    torch.manual_seed(m + n)
    reader, packs = KINDS[precision]
    base = packs(torch.randn(n, k).bfloat16())
    linear = reader.of(base)
    x, bias = torch.randn(m, k).bfloat16() * 100, torch.randn(n).bfloat16()
    for b in (None, bias):
        want = x.double() @ values(base).t() + (0 if b is None else b.double())
        got = linear.matmul(x, b)
        may = want.abs() * 2**-8 + 2**-20 * (x.double().abs() @ values(base).t().abs())
        assert got.dtype is torch.bfloat16 and bool(((got.double() - want).abs() <= may).all())
    if m > 1:  # activations are not rounded: a change of the last bit of one shows
        assert torch.equal(linear.matmul(x[1:2].contiguous(), bias), linear.matmul(x, bias)[1:2])


@pytest.mark.parametrize("precision", KINDS)
def test_activations_are_not_rounded(precision: str) -> None:
    reader, packs = KINDS[precision]
    linear = reader.of(packs(torch.eye(32).bfloat16()))
    x = (1 + torch.arange(32) / 128).bfloat16()[None]  # E4M3 has four of these eight bits
    assert torch.equal(linear.matmul(x, None), x)


@pytest.mark.parametrize("precision", KINDS)
def test_there_is_one_copy(precision: str) -> None:
    reader, packs = KINDS[precision]
    base, new = packs(torch.randn(48, 64).bfloat16()), torch.randn(48, 64).bfloat16()
    linear = reader.of(base)
    assert [t.data_ptr() for t in linear.tensors()] == [t.data_ptr() for t in base.tensors()]
    x = torch.randn(3, 64).bfloat16()
    before = linear.matmul(x, None)
    base.refresh(new)
    assert torch.equal(linear.matmul(x, None), reader(new).matmul(x, None))
    assert not torch.equal(linear.matmul(x, None), before)
    assert linear.by_value == ()


def test_parts_with_tensor_scales_of_their_own() -> None:
    torch.manual_seed(0)
    parts = [nvfp4.quantize(torch.randn(n, 64).bfloat16() * factor) for n, factor in ((32, 1.0), (16, 50.0), (16, 0.1))]
    base = EmulatedNVFP4(torch.zeros(64, 64).bfloat16(), ready=parts)
    x, bias = torch.randn(5, 64).bfloat16(), torch.randn(64).bfloat16()
    want = x.double() @ values(base).t() + bias.double()
    assert torch.allclose(EmulatedW4A16.of(base).matmul(x, bias).double(), want, rtol=2**-8, atol=1e-3)


def test_w4a16_reads_no_other_layout() -> None:
    with pytest.raises(TypeError, match="w4a16 reads the weights of the emulated NVFP4 kernel, not of EmulatedFP8"):
        EmulatedW4A16.of(EmulatedFP8(torch.zeros(16, 16).bfloat16()))


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("kernel", ["native", "emulated"])
def test_the_registry_has_them(precision: str, kernel: str) -> None:
    found = registry.packed_linear(precision, kernel)
    assert (found.precision, found.kernel) == (precision, kernel) and issubclass(found, WeightOnly)
    assert "K = 24 is not a multiple" in str(registry.refusal(precision, kernel, 16, 24))
