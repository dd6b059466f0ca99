"""NVFP4 in plain torch: the numbers that every kernel of this package has to reproduce, on a CPU or a GPU.

A value is ``e2m1 * block_scale * outer_scale``: 4-bit E2M1 elements {0, .5, 1, 1.5, 2, 3, 4, 6} with a sign in bit 3,
two to a byte with the even element in the low nibble; one E4M3 scale for each 16 elements along K; one FP32 outer
scale. ``e2m1 * block_scale`` has at most 6 significant bits and lies in [2^-10, 2688]: exact in BF16 and in FP16.

Block arithmetic, FP32 with round-to-nearest at every step (FlashInfer's ``fp4_quantize`` without fast math), with the
encode scale ``g = 1/outer``: ``a = max|x|``, ``s = e4m3(min(a * (g * (1/6)), 448))``, ``o = min(1 / (s * (1/g)),
FLT_MAX)`` or 0 where a = 0, ``code = e2m1(x * o)``; both roundings to nearest even, both saturating. So a block too
small for the least E4M3 scale gets scale 0: its codes are whatever the formula says and its values are 0. -0.0 keeps
its sign.

The search tries E4M3 codes around that of s, s itself first, then from the smallest: ``scale_search.py``.

Weights have one outer scale for the matrix. Activations have one power of two for each token, so that no row depends on
another, and so that it changes no rounding wherever it is applied: to the BF16 operand or to the BF16 product.

Why these defaults: RMS error of a linear's output in per cent, K = 4096, Gaussian / Student t3 activations
(``scripts/measure_formats``, synthetic).

    activations alone: a token's scale 2^k or exact      9.51 / 9.15   9.50 / 9.11
    one static scale; the same calibrated 8x too small   9.50 / 9.19  56    / 17
    weights alone: absmax, search                        9.50 / 9.53   8.14 / 8.13
    the same, eight input channels 30x: with weighted    9.51          8.08          5.54
    both: search weights, activations by amax/6         12.50 / 12.24
    the better of amax/6 and amax/4 (four-over-six)     11.87 / 11.96

So a power of two costs nothing, and a static scale nothing till calibration misses the largest values.  Four-over-six
would take 2 to 5 % off the error, for some 14 operations an element on top of 19 in the fused kernel (counted, not
timed) and codes that FlashInfer 0.6's quantiser does not give: activations go without, weights are searched once.
Weighting columns for those eight channels costs 1 % on inputs without them (8.22 against 8.15); trying all 127 scales
would reach 5.49 with them and cost 2 %, 6 % for Student t3 weights.

Refused (ValueError): K not a positive multiple of 16, dtypes that are not listed, NaN or infinity in a weight, column
weights that are negative or not finite.
Activations are never inspected by the host; a row with NaN or infinity in it dequantises to NaN throughout, and harms
no other row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mixquant_sglang.formats import BLOCK
from mixquant_sglang.formats.blocks import E2M1_MAX, E4M3_MAX, encode_scale, f32, round_e2m1
from mixquant_sglang.formats.scale_layout import swizzle_scales
from mixquant_sglang.formats.scale_search import search as search_scales

SCALE_MODES = ("absmax", "search")

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLT_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A quantised weight [N, K]: ``packed`` uint8 [N, K/2], ``block_scales`` float8_e4m3fn [N, K/16], finite and >= 0,
    and ``tensor_scale`` float32, 0-d; all on one device."""

    packed: torch.Tensor
    block_scales: torch.Tensor
    tensor_scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """[N, K], in elements."""
        return torch.Size((self.packed.shape[0], self.packed.shape[1] * 2))

    @property
    def nbytes(self) -> int:
        """Bytes held: N*K/2 + N*K/16 + 4."""
        return self.packed.nbytes + self.block_scales.nbytes + self.tensor_scale.nbytes

    def unscaled(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """``e2m1 * block_scale`` [N, K] without the tensor scale: exact in bfloat16, float16 and float32."""
        return _unscaled(self.packed, self.block_scales, dtype)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The values [N, K]: ``e2m1 * block_scale`` exactly, times ``tensor_scale`` in FP32, one cast to ``dtype``."""
        return _rescaled(self.packed, self.block_scales, self.tensor_scale, dtype)

    def swizzled_scales(self) -> torch.Tensor:
        """Block scales in the layout of ``scale_layout.swizzle_scales``."""
        return swizzle_scales(self.block_scales)


@dataclass(frozen=True, eq=False)
class NVFP4Activations:
    """Quantised token rows [M, K]: ``packed`` uint8 [M, K/2], ``block_scales`` float8_e4m3fn [M, K/16], and
    ``row_scales`` float32 [M], each a power of two, or NaN for a row that had NaN or infinity in it."""

    packed: torch.Tensor
    block_scales: torch.Tensor
    row_scales: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """``e2m1 * block_scale * row_scale`` [M, K]; exact in BF16 if the row's largest magnitude is 0 or within
        [1.3e-34, 3.3e38]: outside, the product can leave BF16's exponent range (subnormal rounding, infinity)."""
        return _rescaled(self.packed, self.block_scales, self.row_scales[:, None], dtype)


# (packed, block_scales, x, encode scale g, column weights), filling the first two
Search = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, "torch.Tensor | None"], None]


def quantize(
    x: torch.Tensor,
    *,
    scales: str = "absmax",
    tensor_scale: float | torch.Tensor | None = None,
    column_weights: torch.Tensor | None = None,
    kernel: Search | None = None,
) -> NVFP4Tensor:
    """Quantise a weight ``x`` [N, K]: float32, bfloat16 or float16, any strides; the arithmetic is at this file's top.

    ``scales="absmax"`` takes the block scale from the largest magnitude. ``"search"`` tries the neighbouring E4M3
    scales too, amax/6 (absmax) and amax/4 (four-over-six) among them, and keeps the one with the least squared error:
    no block gets worse, and Gaussian weights lose 27 % of their squared error. ``column_weights`` [K], any float dtype,
    finite and >= 0, weight that error by column; with the mean square of the layer's inputs it is the error of the
    output if inputs are uncorrelated. Only ratios within a block of 16 matter; a block of zeros counts all alike.

    ``tensor_scale`` is amax/(448*6) unless given, in both modes; it is at least 2^-126, and 1 for an all-zero ``x``, so
    that nothing is NaN. Data whose block maxima all lie close to the tensor's (uniform, say) gain from amax/(256*6)
    with "search": the largest blocks can then take amax/4 as well. Works through ``x`` in chunks of rows; synchronises
    with the device. ``kernel`` takes the place of the search, and gives the same bits (``kernels/packing.py``).
    ValueError: see this file's top.
    """
    if scales not in SCALE_MODES:
        raise ValueError(f"scales={scales!r}: allowed are {', '.join(map(repr, SCALE_MODES))}")
    _check(x, _WEIGHT_DTYPES)
    weights = None if column_weights is None else _ratios(column_weights, scales, x)
    x = x.detach()
    outer = _outer_scale(x, tensor_scale)
    packed, block_scales = _empty_codes(x)
    if scales == "search" and kernel is not None:
        kernel(packed, block_scales, x, f32(1 / outer), weights)
    else:
        for rows in _chunks(x):
            packed[rows], block_scales[rows] = _quantize_blocks(
                x[rows].float(), 1 / outer, search=scales == "search", weights=weights
            )
    return NVFP4Tensor(packed, block_scales, torch.tensor(outer, dtype=torch.float32, device=x.device))


def row_scales(x: torch.Tensor) -> torch.Tensor:
    """The outer scale of each token row of ``x`` [M, K], bfloat16, K a multiple of 16: float32 [M]; no synchronisation.

    2^k with the least k for which max|row| <= 448*6 * 2^k, taken from the bits of the maximum; k >= -126, so that 2^k
    and 2^-k are normal floats (in BF16 too); 1 for a row of zeros; NaN for a row with NaN or infinity in it.
    """
    _check(x, (torch.bfloat16,))
    bits = (x.detach().view(torch.int16) & 0x7FFF).amax(dim=-1).int() << 16  # NaN and infinity are the largest integers
    # 448*6 = 1.3125 * 2^11, and 0x280000 is the mantissa field of 1.3125
    exponent = ((bits >> 23) - 138 + ((bits & 0x7FFFFF) > 0x280000).int()).clamp_(min=-126).masked_fill_(bits == 0, 0)
    return ((exponent + 127) << 23).view(torch.float32).masked_fill(bits >= 0x7F800000, math.nan)


def quantize_activations(x: torch.Tensor) -> NVFP4Activations:
    """Quantise token rows ``x`` [M, K], bfloat16, any strides, M = 0 included; never synchronises with the device.

    A row divided by its ``row_scales`` goes through the block arithmetic with g = 1. ValueError: shape or dtype.
    """
    outer = row_scales(x)
    packed, block_scales = _empty_codes(x)
    for rows in _chunks(x):
        scale = outer[rows, None]
        scaled = x[rows].detach().float().mul_(scale.reciprocal()).masked_fill_(scale.isnan(), 0.0)
        packed[rows], block_scales[rows] = _quantize_blocks(scaled, 1.0, search=False)
    return NVFP4Activations(packed, block_scales, outer)


def nearest(x: torch.Tensor, scaled: NVFP4Tensor) -> torch.Tensor:
    """``x`` [N, K] rounded to nearest with the scales of ``scaled`` [N, K]: float32, zero where a scale is zero."""
    step = (scaled.block_scales.float() * scaled.tensor_scale).repeat_interleave(BLOCK, dim=1)
    magnitude = (x.float().abs() / step).masked_fill_(step == 0, 0.0).clamp_(max=E2M1_MAX)
    return (round_e2m1(magnitude) * step).copysign(x)


def _quantize_blocks(
    x: torch.Tensor, g: float, *, search: bool, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of FP32 rows [r, K], which are finite; every scalar here is rounded to FP32 before it is
    used."""
    g = f32(g)
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    amax = blocks.abs().amax(dim=-1)
    scales = (amax * f32(g * f32(1 / 6))).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    if search:
        scales = search_scales(blocks.abs().permute(2, 0, 1).contiguous(), amax, scales, g, weights)
    scaled = blocks * encode_scale(amax, scales, g)[..., None]
    value = round_e2m1(scaled.abs().clamp_(max=E2M1_MAX))
    # on the E2M1 grid the code is a concave piecewise linear function of the magnitude
    code = torch.minimum(torch.minimum(value * 2, value + 2), value * 0.5 + 4).to(torch.uint8)
    code = (code | (scaled.signbit().to(torch.uint8) << 3)).reshape(x.shape[0], -1)
    return code[:, ::2] | (code[:, 1::2] << 4), scales


def _unscaled(packed: torch.Tensor, block_scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    byte = torch.arange(256, dtype=torch.int32, device=packed.device)
    code = torch.stack((byte & 15, byte >> 4), dim=-1)
    low3 = (code & 7).float()  # the inverse of the code formula in _quantize_blocks is convex
    magnitude = torch.maximum(torch.maximum(low3 * 0.5, low3 - 2), low3 * 2 - 8)
    pairs = torch.where(code < 8, magnitude, -magnitude).to(dtype)
    values = pairs.index_select(0, packed.flatten().int()).view(packed.shape[0], -1, BLOCK)
    return values.mul_(block_scales.to(dtype)[..., None]).view(packed.shape[0], packed.shape[1] * 2)


def _rescaled(
    packed: torch.Tensor, block_scales: torch.Tensor, outer: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty((packed.shape[0], packed.shape[1] * 2), dtype=dtype, device=packed.device)
    for rows in _chunks(out):
        scale = outer if outer.ndim == 0 else outer[rows]
        out[rows] = _unscaled(packed[rows], block_scales[rows], torch.float32).mul_(scale)
    return out


def _check(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % BLOCK:
        raise ValueError(f"NVFP4 needs a matrix whose K is a positive multiple of {BLOCK}, got shape {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"NVFP4 quantises {', '.join(map(str, dtypes))} here, got {x.dtype}")


def _ratios(column_weights: torch.Tensor, scales: str, x: torch.Tensor) -> torch.Tensor:
    """Each block's column weights over the largest of them: FP32 [K] on ``x``'s device."""
    if scales != "search":
        raise ValueError(f"column_weights weight the errors of scales='search', got scales={scales!r}")
    weights = column_weights.detach().double()
    if weights.shape != x.shape[1:] or not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"column_weights must be [{x.shape[1]}], finite and >= 0, got {list(weights.shape)}")
    blocks = weights.view(-1, BLOCK)
    largest = blocks.amax(dim=-1, keepdim=True)
    return torch.where(largest > 0, blocks / largest, 1.0).flatten().to(x.device, torch.float32)


def _outer_scale(x: torch.Tensor, given: float | torch.Tensor | None) -> float:
    low, high = (float(bound) for bound in torch.aminmax(x)) if x.shape[0] else (0.0, 0.0)  # they propagate NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("cannot quantise a weight that contains NaN or infinity: check the checkpoint")
    amax = max(-low, high)
    outer = float(given) if given is not None else max(amax / (E4M3_MAX * E2M1_MAX), _FLT_TINY) if amax else 1.0
    if not _FLT_TINY <= outer <= 1 / _FLT_TINY:
        raise ValueError(f"tensor_scale must be in [2^-126, 2^126], got {outer}")
    return f32(outer)


def _empty_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = x.shape
    packed = torch.empty((n, k // 2), dtype=torch.uint8, device=x.device)
    return packed, torch.empty((n, k // BLOCK), dtype=torch.float8_e4m3fn, device=x.device)


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of rows: 64 MiB for each FP32 temporary on a GPU; 4 MiB on a CPU, near the size of its cache."""
    step = max(1, (2**24 if x.is_cuda else 2**20) // x.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))
