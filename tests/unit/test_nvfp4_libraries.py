"""Our NVFP4 numbers against those of compressed-tensors and torchao: what is the same to the bit, and what is not.

The same: the E2M1 grid, ties, saturation, signs, nibbles, and codes for a given scale.  Two things differ, and both
show only where a number lies on or next to a boundary between two codes, so that its last FP32 bit decides:

* an element is divided by its scale (compressed-tensors), or multiplied by a reciprocal (ours, FlashInfer's; torchao's
  is composed in another order, which is the same for a tensor scale that is a power of two)
* a block scale comes from ``amax / 6``, in the input's dtype (compressed-tensors) or in FP32 (torchao); ours from
  ``amax * (g * (1/6))``

and each library has its own idea of scales too small for E4M3's normals: torchao takes 2^-6 for all below, and
compressed-tensors 0.125 for those that round to zero; ours are subnormal or zero, as FlashInfer's.

That NaN and infinity are refused under the tensor's name is in test_checkpoint.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from mixquant_sglang.formats import nvfp4, scale_layout

SCALE_GRID = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
SCALE_TIES = (SCALE_GRID[1:] + SCALE_GRID[:-1]) / 2
CODE_TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
FP32, BF16 = 2.0**-22, 2.0**-7  # a few roundings of a quotient in that format
DTYPES = (torch.float32, torch.bfloat16)


def near(value: torch.Tensor, boundaries: torch.Tensor, relative: float) -> torch.Tensor:
    """Where ``value``, float64, lies on or next to a boundary."""
    above = torch.searchsorted(boundaries, value).clamp(max=len(boundaries) - 1)
    distance = torch.minimum((value - boundaries[above]).abs(), (value - boundaries[(above - 1).clamp(min=0)]).abs())
    return distance <= relative * value


def normal(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3))


def heavy(n: int, k: int) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.distributions.StudentT(3.0).sample((n, k))


def wide(n: int, k: int) -> torch.Tensor:
    """Blocks of all magnitudes down to 2^-40: scales in the middle, subnormal and zero."""
    return normal(n, k) * torch.logspace(0, -12, k // 16).repeat_interleave(16)


# an input and the factor by which its tensor scale is larger than usual
INPUTS = {
    "random": (normal(64, 512), 1.0),
    "heavy-tailed": (heavy(64, 512), 1.0),
    "constant": (torch.full((5, 48), -0.037), 1.0),
    "zero": (torch.zeros(3, 32), 1.0),
    "zero blocks": (normal(8, 64) * torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat_interleave(16), 1.0),
    "subnormal scales": (normal(64, 512), 2.0**15),
    "all magnitudes": (wide(64, 512), 1.0),
    "saturating": (normal(64, 512) * 1e6, 2.0**-6),
    "tiny": (normal(64, 512) * 1e-30, 1.0),
    "huge": (normal(64, 512) * 1e30, 1.0),
}


def cases(name: str, dtype: torch.dtype, power: bool) -> tuple[torch.Tensor, nvfp4.NVFP4Tensor]:
    """An input and our numbers for it, with a tensor scale that is, or is not, a power of two."""
    x, factor = INPUTS[name]
    x = x.to(dtype)
    usual = float(x.abs().max().float() / 2688) or 1.0
    if power:
        usual = 2.0 ** math.ceil(math.log2(usual))
    return x, nvfp4.quantize(x, tensor_scale=usual * factor)


def codes(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def blocks_of(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1, 16)


def bytes_of(scales: torch.Tensor) -> torch.Tensor:
    return scales.to(torch.float8_e4m3fn).view(torch.uint8)


def check_codes(
    x: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor, scales: torch.Tensor, where: torch.Tensor, outer: float
) -> int:
    """Packed codes are the same in the blocks ``where``, but for neighbours where x / scale is next to a boundary.

    Returns how many differ."""
    mine, other = blocks_of(codes(ours)), blocks_of(codes(theirs))
    value = blocks_of(x).double().abs() / (scales.double() * outer)[..., None]
    zero = mine & 7 == 0  # a zero may be either zero: torch.sign(-0.0) is 0
    differs = (mine != other) & ~(zero & (other & 7 == 0)) & where[..., None]
    assert bool(near(value, CODE_TIES, FP32)[differs].all())
    assert bool(((mine.int() - other.int()).abs() <= 1)[differs].all())
    signs = (blocks_of(x) != 0) & where[..., None]
    assert torch.equal((mine >> 3)[signs], (other >> 3)[signs])
    return int(differs.sum())


def check_scales(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, where: torch.Tensor, relative: float
) -> None:
    """Scales are the same in the blocks ``where``, but for neighbours next to a boundary; ``exact`` is float64."""
    differs = (bytes_of(ours) != bytes_of(theirs)) & where
    assert bool(near(exact, SCALE_TIES, relative)[differs].all())
    assert bool(((bytes_of(ours).int() - bytes_of(theirs).int()).abs() <= 1)[differs].all())


@pytest.mark.parametrize("power", [True, False], ids=["power of two", "any tensor scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_compressed_tensors(name: str, dtype: torch.dtype, power: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    e4m3 = torch.float8_e4m3fn
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        symmetric=True,
        group_size=16,
        scale_dtype=e4m3,
        zp_dtype=e4m3,
    )
    x, q = cases(name, dtype, power)
    outer, scales = float(q.tensor_scale), q.block_scales.float()
    encode = (1 / q.tensor_scale).reshape(1)
    blocks = blocks_of(x)
    amax = blocks.abs().amax(-1)

    # codes, with our scales; scales of zero, by which they would divide, are theirs
    given = torch.where(scales == 0, 0.125, scales)
    theirs = pack_fp4_to_uint8(quantize(x=x, scale=given, zero_point=None, args=args, global_scale=encode))
    differing = check_codes(x, q.packed, theirs, given, scales > 0, outer)
    assert differing <= 0.003 * x.numel()
    lost = blocks_of(codes(theirs))[scales == 0] & 7
    assert name in ("zero", "zero blocks") or bool((amax[scales == 0].double() <= 6 * 2.0**-10 * outer * 1.01).all())
    assert not lost.any()  # what rounds to a scale of zero has codes of zero there, and values of zero here
    assert not q.unscaled().reshape(blocks.shape)[scales == 0].any()

    # scales
    found, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=encode)
    exact = amax.double() / 6 / outer
    rule = (encode * (amax / 6)).clamp(max=448.0).to(e4m3).float()
    assert torch.equal(found.float(), torch.where(rule == 0, 0.125, rule))
    below = exact < 2.0**-10 * (1 + BF16)
    check_scales(scales, found, exact, ~below, BF16 if dtype is torch.bfloat16 else FP32)
    assert bool(((scales[below] == 0) | (scales[below] == 2.0**-9)).all())


@pytest.mark.parametrize("power", [True, False], ids=["power of two", "any tensor scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_torchao(name: str, dtype: torch.dtype, power: bool) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    x, q = cases(name, dtype, power)
    outer, scales = float(q.tensor_scale), q.block_scales.float()
    found, theirs = nvfp4_quantize(x.contiguous(), per_tensor_scale=q.tensor_scale)
    found = found.reshape(scales.shape)
    amax = blocks_of(x).float().abs().amax(-1)
    rule = (amax / 6 / q.tensor_scale).clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn)
    assert torch.equal(bytes_of(found), bytes_of(rule))
    exact = amax.double() / 6 / outer
    normal_scales = exact >= 2.0**-6
    check_scales(scales, found, exact, normal_scales, FP32)
    assert bool((found.float()[~normal_scales] == 2.0**-6).all()) and bool((scales[~normal_scales] <= 2.0**-6).all())
    same = bytes_of(found) == bytes_of(scales)
    differing = check_codes(x, q.packed, theirs.reshape(q.packed.shape), scales, same, outer)
    if power:  # then it is the same arithmetic
        assert differing == 0
    assert bool(same.float().mean() > 0.9) or name in ("zero", "zero blocks", "subnormal scales", "all magnitudes")


def test_torchao_with_our_scales() -> None:
    """Their element arithmetic, also for the subnormal scales that they never choose."""
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, pack_uint4

    for name in ("random", "heavy-tailed", "subnormal scales", "saturating", "constant"):
        x, q = cases(name, torch.bfloat16, True)
        scales = q.block_scales.float()
        scaled = blocks_of(x).float() * (1 / q.tensor_scale / scales)[..., None]
        scaled = torch.where(scales[..., None] == 0, 0.0, scaled).clamp(-6.0, 6.0).reshape(x.shape)
        theirs = pack_uint4(f32_to_f4_unpacked(scaled))
        assert check_codes(x, q.packed, theirs, scales, scales > 0, float(q.tensor_scale)) == 0


SHAPES = [(1, 16), (128, 64), (129, 80), (200, 2048), (257, 48)]


def random_scales(n: int, k: int) -> torch.Tensor:
    return torch.randint(1, 127, (n, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_swizzle_is_torchaos(n: int, k: int) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

    scales = random_scales(n, k)
    swizzled = scale_layout.swizzle_scales(scales).view(torch.uint8)
    assert torch.equal(swizzled.flatten(), to_blocked(scales.view(torch.uint8)))
    assert torch.equal(from_blocked(swizzled.flatten(), n, k // 16), scales.view(torch.uint8))
    assert torch.equal(
        scale_layout.unswizzle_scales(to_blocked(scales.view(torch.uint8)), n, k), scales.view(torch.uint8)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_they_would_take_and_we_refuse(bad: float, dtype: torch.dtype) -> None:
    x = normal(4, 32).to(dtype)
    x[2, 9] = bad
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        nvfp4.quantize(x)
