"""RMSNorm of a row, by weight or 1 + weight, with a residual added before it: see ``activations.rmsnorm``.

FlashInfer's ``rmsnorm_quant`` and ``rmsnorm_fp4quant`` take one scale for the tensor: ``docs/kernels.md``.
"""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.pieces import load_piece, load_row, store_row
from mixquant_sglang.kernels.triton.words import bf16_pairs, floats


@triton.jit  # type: ignore[untyped-decorator]
def norm_row(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    SM: tl.constexpr,
) -> tl.tuple:
    x = load_row(x_ptr, K, THREADS, SPLIT, None)
    t: tl.tuple = ()
    if residual_ptr is not None:  # loads do not move up past stores, so all of them come first
        residual = load_row(residual_ptr, K, THREADS, SPLIT, None)
        added: tl.tuple = ()
        for i in tl.static_range(len(x)):
            t += (floats(x[i], THREADS) + floats(residual[i], THREADS),)
            added += (bf16_pairs(t[i], THREADS, SM),)
        store_row(residual_ptr, added, K, THREADS, SPLIT)
    else:
        for i in tl.static_range(len(x)):
            t += (floats(x[i], THREADS),)
    squares = t[0] * t[0]
    for i in tl.static_range(1, len(t)):
        squares += t[i] * t[i]
    r = tl.rsqrt(tl.div_rn(tl.sum(squares), K * 1.0) + eps)
    y: tl.tuple = ()
    for i in tl.static_range(len(t)):
        weight = floats(load_piece(weight_ptr, i, K, THREADS, SPLIT, None), THREADS)
        if ZERO_CENTRED:
            weight += 1.0
        y += (bf16_pairs(t[i] * r * weight, THREADS, SM),)
    return y
