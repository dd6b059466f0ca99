"""A row to FP8: ``formats.fp8.quantize_activations``."""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.pieces import store_piece
from mixquant_sglang.kernels.triton.row_scale import largest_of_row
from mixquant_sglang.kernels.triton.words import all_floats


@triton.jit  # type: ignore[untyped-decorator]
def store_fp8(row_ptr: tl.tensor, scale_ptr: tl.tensor, row: tl.tuple, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    """No clamp is needed: |y| / scale exceeds 448 by two roundings at most, and E4M3 rounds that to 448."""
    y = all_floats(row, THREADS)
    scale = tl.div_rn(largest_of_row(y).to(tl.float32, bitcast=True), 448.0).to(tl.int32, bitcast=True)
    scale = tl.maximum(scale, 0x00800000).to(tl.float32, bitcast=True)  # 2^-126; compared as integers, NaN stays
    tl.store(scale_ptr, scale)
    inverse = tl.div_rn(1.0, scale)
    for i in tl.static_range(len(y)):
        store_piece(row_ptr, i, (y[i] * inverse).to(tl.float8e4nv), K, THREADS)
