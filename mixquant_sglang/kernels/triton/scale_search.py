"""Weights to NVFP4 with the block scales of least squared error: ``formats.nvfp4.quantize(scales="search")`` on a GPU.

The same bits as the plain torch there, which states the arithmetic and the order of the sum: IEEE divisions, no fused
multiply-add. A thread has a block of 16 to itself, in registers, so the sum needs no other thread and no layout of
Triton's can change its order. Bound by instructions, some 12 for each weight and candidate; each weight is read once.

Refused (ValueError): tensors whose shapes or dtypes do not fit. NaN and infinity are the caller's to refuse.
"""

import torch
import triton
import triton.language as tl

from mixquant_sglang.formats.blocks import f32
from mixquant_sglang.formats.scale_search import SEARCH_GAIN, SEARCH_OFFSETS
from mixquant_sglang.kernels.triton.grid import e2m1_code, e4m3_code, e4m3_value, encode_scale, to_e2m1, to_e4m3

_BLOCKS = 128  # of 16 weights, for each program: one for each thread


def quantize_(
    packed: torch.Tensor,
    block_scales: torch.Tensor,
    x: torch.Tensor,
    g: float,
    weights: torch.Tensor | None = None,
) -> None:
    """Fills ``packed`` uint8 [N, K/2] and ``block_scales`` float8_e4m3fn [N, K/16], contiguous, from ``x`` [N, K]:
    float32, bfloat16 or float16, any strides, finite.

    ``g`` is the encode scale, exact in FP32; ``weights`` float32 [K] is what each column's errors count. No
    synchronisation. ValueError: see above.
    """
    n, k = x.shape
    for tensor, name, shape, dtype in (
        (packed, "packed", (n, k // 2), torch.uint8),
        (block_scales, "block_scales", (n, k // 16), torch.float8_e4m3fn),
        *([] if weights is None else [(weights, "weights", (k,), torch.float32)]),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or k % 16:
            raise ValueError(
                f"{name} must be contiguous {dtype} {list(shape)}, K a multiple of 16, for x {list(x.shape)}; "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    blocks = n * k // 16
    if not blocks:
        return
    with torch.cuda.device(x.get_device()):
        _search_scales[(triton.cdiv(blocks, _BLOCKS),)](
            x,
            weights,
            packed.view(torch.int32),
            block_scales.view(torch.uint8),
            blocks,
            k // 16,
            x.stride(0),
            x.stride(1),
            g,
            f32(g * f32(1 / 6)),
            f32(1 / g),
            FIRST=SEARCH_OFFSETS.start,
            LAST=SEARCH_OFFSETS.stop - 1,
            GAIN=SEARCH_GAIN,
            BLOCKS=_BLOCKS,
            num_warps=_BLOCKS // 32,
            enable_fp_fusion=False,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _search_scales(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    blocks: tl.tensor,
    row_blocks: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    g: tl.tensor,
    g_sixth: tl.tensor,
    g_inverse: tl.tensor,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """``weight_ptr`` may be None."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < blocks
    column = block % row_blocks * 16
    x_ptr += block // row_blocks * row_stride + column * column_stride
    x: tl.tuple = ()
    magnitude: tl.tuple = ()
    weight: tl.tuple = ()
    amax = tl.zeros([BLOCKS], dtype=tl.float32)
    for i in tl.static_range(16):
        x += (tl.load(x_ptr + i * column_stride, mask=mask, other=0.0).to(tl.float32),)
        magnitude += (tl.abs(x[i]),)
        amax = tl.maximum(amax, magnitude[i])
        if weight_ptr is not None:
            weight += (tl.load(weight_ptr + column + i, mask=mask, other=0.0),)

    first = e4m3_code(to_e4m3(amax * g_sixth))
    best = first
    best_error = _error(magnitude, weight, first, g, g_inverse)
    for offset in range(FIRST, LAST + 1):  # 0 does not win against itself, nor against what won against it
        candidate = tl.minimum(tl.maximum(first + offset, 0), 126)
        error = _error(magnitude, weight, candidate, g, g_inverse)
        better = error < best_error * GAIN
        best = tl.where(better, candidate, best)
        best_error = tl.where(better, error, best_error)

    encode = encode_scale(e4m3_value(best) * g_inverse)
    for half in tl.static_range(2):
        word = tl.zeros([BLOCKS], dtype=tl.int32)
        for i in tl.static_range(8):
            code = e2m1_code(to_e2m1(magnitude[half * 8 + i] * encode))
            sign = (x[half * 8 + i].to(tl.int32, bitcast=True) >> 28) & 8
            word |= (code | sign) << (4 * i)
        tl.store(packed_ptr + block * 2 + half, word, mask=mask)
    tl.store(scale_ptr + block, best.to(tl.uint8), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _error(magnitude: tl.tuple, weight: tl.tuple, code: tl.tensor, g: tl.tensor, g_inverse: tl.tensor) -> tl.tensor:
    scale = e4m3_value(code)
    encode = encode_scale(scale * g_inverse)
    terms: tl.tuple = ()
    for i in tl.static_range(16):
        difference = to_e2m1(magnitude[i] * encode) * scale - magnitude[i] * g
        term = difference * difference
        if len(weight):
            term *= weight[i]
        terms += (term,)
    return _halved(_halved(_halved(_halved(terms))))[0]


@triton.jit  # type: ignore[untyped-decorator]
def _halved(terms: tl.tuple) -> tl.tuple:
    sums: tl.tuple = ()
    for i in tl.static_range(len(terms) // 2):
        sums += (terms[i] + terms[i + len(terms) // 2],)
    return sums
