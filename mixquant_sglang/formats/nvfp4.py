"""NVFP4 in plain torch: the numbers that every kernel of this package has to reproduce, on a CPU or a GPU.

One thing here is not plain torch: on a GPU of SM80 or newer ``quantize(scales="search")`` runs
``kernels/triton/scale_search.py``, which makes the same choice to the bit.

A value is ``e2m1 * block_scale * outer_scale``: 4-bit E2M1 elements {0, .5, 1, 1.5, 2, 3, 4, 6} with a sign in bit 3,
two to a byte with the even element in the low nibble; one E4M3 scale for each 16 elements along K; one FP32 outer
scale. ``e2m1 * block_scale`` has at most 6 significant bits and lies in [2^-10, 2688]: exact in BF16 and in FP16.

Block arithmetic, FP32 with round-to-nearest at every step (FlashInfer's ``fp4_quantize`` without fast math), with the
encode scale ``g = 1/outer``: ``a = max|x|``, ``s = e4m3(min(a * (g * (1/6)), 448))``, ``o = min(1 / (s * (1/g)),
FLT_MAX)`` or 0 where a = 0, ``code = e2m1(x * o)``; both roundings to nearest even, both saturating. So a block too
small for the least E4M3 scale gets scale 0: its codes are whatever the formula says and its values are 0. -0.0 keeps
its sign.

The search tries E4M3 codes around that of s, s itself first, then from the smallest. With d = (value
of the code) * scale - |x| * g, the error is the sum of ``d * d`` (``* w`` of the column, if weighted), each product
rounded to FP32, added in halves: 0 to 7 with 8 to 15, then 0 to 3 with 4 to 7, and so on. A candidate wins if its error
is under (1 - 2^-14) of the best so far. Nothing depends on the device or on a library's order of summation.

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
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import torch

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
SCALE_MODES = ("absmax", "search")

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLT_MAX = torch.finfo(torch.float32).max
_FLT_TINY = torch.finfo(torch.float32).tiny
# E4M3 codes around the absmax one that "search" tries, after absmax: eight codes are a factor of two, so -2 lets the
# largest element saturate, and +4 or +5 is absmax/4. Against all 126 scales this costs at most 0.1 % of the error
# (uniform data), 0 on Gaussian, Laplace and Student-t. With column weights a scale far below absmax can be best, but
# then it gives up the columns that calibration found quiet: scripts/measure_formats has both errors.
SEARCH_OFFSETS = range(-2, 7)
# a candidate has to win by more than FP32 noise in the error, so that none makes a block worse
SEARCH_GAIN = 1 - 2.0**-14
_E4M3_LAST = 126  # the code of 448


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
        """Block scales in the layout of ``swizzle_scales``."""
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


def quantize(
    x: torch.Tensor,
    *,
    scales: str = "absmax",
    tensor_scale: float | torch.Tensor | None = None,
    column_weights: torch.Tensor | None = None,
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
    with the device. ValueError: see this file's top.
    """
    if scales not in SCALE_MODES:
        raise ValueError(f"scales={scales!r}: allowed are {', '.join(map(repr, SCALE_MODES))}")
    _check(x, _WEIGHT_DTYPES)
    weights = None if column_weights is None else _ratios(column_weights, scales, x)
    x = x.detach()
    outer = _outer_scale(x, tensor_scale)
    packed, block_scales = _empty_codes(x)
    if scales == "search" and _has_kernel(x.device):
        from mixquant_sglang.kernels.triton import scale_search

        scale_search.quantize_(packed, block_scales, x, f32(1 / outer), weights)
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
    return (_round_e2m1(magnitude) * step).copysign(x)


def swizzle_scales(block_scales: torch.Tensor) -> torch.Tensor:
    """Block scales [M, K/16] in the 128x4 layout of the Blackwell GEMMs (cuBLAS, CUTLASS, FlashInfer).

    float8_e4m3fn [ceil(M/128)*128, ceil(K/16/4)*4]; the scale of row m and block b lies at the flat offset
    ``((m//128) * ceil(KB/4) + b//4)*512 + (m%32)*16 + (m%128//32)*4 + b%4``, KB = K/16; padding is zero.
    """
    m, blocks = block_scales.shape
    rows, cols = _padded(m, blocks)
    linear = torch.zeros((rows, cols), dtype=torch.uint8, device=block_scales.device)
    linear[:m, :blocks] = block_scales.view(torch.uint8)
    tiles = linear.view(rows // 128, 4, 32, cols // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, cols).view(torch.float8_e4m3fn)


def unswizzle_scales(swizzled: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Undo ``swizzle_scales``: [n, k/16] from a 1-byte tensor of any shape with the padded number of
    scales."""
    rows, cols = _padded(n, k // BLOCK)
    if k % BLOCK or swizzled.element_size() != 1 or swizzled.numel() != rows * cols:
        raise ValueError(
            f"128x4 scales of an [{n}, {k}] weight are {rows * cols} bytes (K a multiple of {BLOCK}); "
            f"got {swizzled.numel()} elements of {swizzled.dtype}"
        )
    tiles = swizzled.contiguous().view(torch.uint8).view(rows // 128, cols // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, cols)[:n, : k // BLOCK].contiguous().view(swizzled.dtype)


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
        scales = _search(blocks.abs().permute(2, 0, 1).contiguous(), amax, scales, g, weights)
    scaled = blocks * _encode_scale(amax, scales, g)[..., None]
    value = _round_e2m1(scaled.abs().clamp_(max=E2M1_MAX))
    # on the E2M1 grid the code is a concave piecewise linear function of the magnitude
    code = torch.minimum(torch.minimum(value * 2, value + 2), value * 0.5 + 4).to(torch.uint8)
    code = (code | (scaled.signbit().to(torch.uint8) << 3)).reshape(x.shape[0], -1)
    return code[:, ::2] | (code[:, 1::2] << 4), scales


def _search(
    magnitude: torch.Tensor,
    amax: torch.Tensor,
    absmax: torch.Tensor,
    g: float,
    weights: torch.Tensor | None = None,
    offsets: range = SEARCH_OFFSETS,
) -> torch.Tensor:
    """The E4M3 scale [r, K/16] with the least squared error for each block of ``magnitude`` [16, r, K/16]; errors are
    in units of the outer scale, and weighted by ``weights`` [K] if given.

    The arithmetic is at this file's top; elements come first so that each step runs over contiguous memory.
    """
    target = magnitude * g
    weights = weights if weights is None else weights.view(-1, BLOCK).t()[:, None]

    def error(scales: torch.Tensor) -> torch.Tensor:
        value = _round_e2m1((magnitude * _encode_scale(amax, scales, g)).clamp_(max=E2M1_MAX))
        terms = value.mul_(scales.float()).sub_(target).square_()
        terms = terms if weights is None else terms.mul_(weights)
        for half in (8, 4, 2, 1):
            terms = terms[:half].add_(terms[half:])
        return terms[0]

    first = absmax.view(torch.uint8).to(torch.int16)
    best, best_error = absmax.view(torch.uint8).clone(), error(absmax)
    for offset in filter(None, offsets):
        candidate = (first + offset).clamp_(0, _E4M3_LAST).to(torch.uint8)
        candidate_error = error(candidate.view(torch.float8_e4m3fn))
        better = candidate_error < best_error * SEARCH_GAIN
        best, best_error = torch.where(better, candidate, best), torch.where(better, candidate_error, best_error)
    return best.view(torch.float8_e4m3fn)


def _encode_scale(amax: torch.Tensor, scales: torch.Tensor, g: float) -> torch.Tensor:
    o = (scales.float() * f32(1 / g)).reciprocal_().clamp_(max=_FLT_MAX)
    return o.masked_fill_(amax == 0, 0.0)


def _round_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Round FP32 magnitudes <= 6 to E2M1 in place, to nearest even: adding 1.5 * 2^23 grid steps leaves no bits below a
    step. The step is .5, 1 or 2 for magnitudes in [0, 2), [2, 4), [4, 6]: half of the power of two below it, and at
    least .5."""
    power = (magnitude.view(torch.int32) & 0x7F800000).clamp_(min=0x3F800000).view(torch.float32)
    shift = power.mul_(0.75 * 2**23)
    return magnitude.add_(shift).sub_(shift)


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


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


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


def _padded(n: int, blocks: int) -> tuple[int, int]:
    return -(-n // 128) * 128, -(-blocks // 4) * 4


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of rows: 64 MiB for each FP32 temporary on a GPU; 4 MiB on a CPU, near the size of its cache."""
    step = max(1, (2**24 if x.is_cuda else 2**20) // x.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def f32(value: float) -> float:
    """``value`` rounded to FP32. For one product or quotient of two FP32 numbers, float64 in between changes
    nothing."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
