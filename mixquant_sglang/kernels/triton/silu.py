"""SiLU(gate) x up of a row, and GELU(gate) x up: see ``activations.silu_mul`` and ``gelu_mul``.

FlashInfer's ``silu_and_mul_nvfp4_quantize`` (0.7.2) takes one scale for the tensor: ``docs/kernels.md``.
"""

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


@triton.jit  # type: ignore[untyped-decorator]
def gelu_row(
    gate_ptr: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, SM: tl.constexpr
) -> tl.tuple:
    """With (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)): ``silu_row`` of another exponent, -2u in powers of two."""
    y: tl.tuple = ()
    for i in tl.static_range(pieces_of(K, THREADS, SPLIT)):
        gate = floats(load_piece(gate_ptr, i, K, THREADS, SPLIT, None), THREADS)
        up = floats(load_piece(gate_ptr + K, i, K, THREADS, SPLIT, None), THREADS)
        root = tl.rsqrt(1.0 + tl.exp2(gate * (-2.302208198144325 - 0.1029432395800235 * (gate * gate))))
        y += (bf16_pairs(gate * root * root * up, THREADS, SM),)
    return y
