"""A row to the BF16 values of NVFP4: ``formats.nvfp4.quantize_activations(x).dequantize()``."""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.grid import block_scale_of, encode_scale, to_e2m1
from mixquant_sglang.kernels.triton.pieces import store_piece
from mixquant_sglang.kernels.triton.row_scale import largest_of_row, row_scale_of
from mixquant_sglang.kernels.triton.words import all_floats


@triton.jit  # type: ignore[untyped-decorator]
def store_qdq(row_ptr: tl.tensor, row: tl.tuple, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    y = all_floats(row, THREADS)
    row_scale, inverse = row_scale_of(largest_of_row(y))
    for i in tl.static_range(len(y)):
        blocks = tl.reshape(y[i], [THREADS // 2, 16])
        value, scale = _blocks(blocks, inverse)
        value = (value * (scale * row_scale)[:, None]).to(tl.int32, bitcast=True)
        value = (value | _sign(blocks)).to(tl.float32, bitcast=True)
        store_piece(row_ptr, i, tl.reshape(value.to(tl.bfloat16), [THREADS, 8]), K, THREADS)


@triton.jit  # type: ignore[untyped-decorator]
def _blocks(y: tl.tensor, inverse: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Magnitudes on the E2M1 grid [BLOCKS, 16] and scales on the E4M3 grid [BLOCKS], both FP32, of ``y * inverse``."""
    scaled = y * inverse
    scale = block_scale_of(tl.max(tl.abs(scaled), axis=1))
    return to_e2m1(tl.abs(scaled) * encode_scale(scale)[:, None]), scale


@triton.jit  # type: ignore[untyped-decorator]
def _sign(x: tl.tensor) -> tl.tensor:
    return x.to(tl.int32, bitcast=True) & -0x80000000
