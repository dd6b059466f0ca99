"""SiLU(gate) x up of a row: see ``activations.silu_mul``."""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.pieces import load_piece, pieces_of
from mixquant_sglang.kernels.triton.words import bf16_pairs, floats


@triton.jit  # type: ignore[untyped-decorator]
def silu_row(
    gate_ptr: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, SM: tl.constexpr
) -> tl.tuple:
    """exp2 and rsqrt flush subnormals, which changes nothing here: 1 + e is at least 1, and is 1 long before e gets
    subnormal. An IEEE division for each element would take a third of the instructions that memory leaves time for."""
    y: tl.tuple = ()
    for i in tl.static_range(pieces_of(K, THREADS, SPLIT)):
        gate = floats(load_piece(gate_ptr, i, K, THREADS, SPLIT, None), THREADS)
        up = floats(load_piece(gate_ptr + K, i, K, THREADS, SPLIT, None), THREADS)
        root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))
        y += (bf16_pairs(gate * root * root * up, THREADS, SM),)
    return y
