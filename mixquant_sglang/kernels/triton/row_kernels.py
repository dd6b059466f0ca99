"""The two kernels that quantise rows where they are made: see ``activations.py``."""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.norm import norm_row
from mixquant_sglang.kernels.triton.pieces import load_row, store_row
from mixquant_sglang.kernels.triton.scale_tiles import scales_of, store_scales, zero_scales
from mixquant_sglang.kernels.triton.silu import gelu_row, silu_row
from mixquant_sglang.kernels.triton.store_fp8 import store_fp8
from mixquant_sglang.kernels.triton.store_nvfp4 import store_nvfp4
from mixquant_sglang.kernels.triton.store_qdq import store_qdq


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def quantize_rows(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
    SOURCE: tl.constexpr,
    FORMAT: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """One program for each row (plain rows to NVFP4: ``quantize_pairs``); pointers that a case does not need are None.

    A row is a tuple of pieces: BF16 pairs in uint32 [THREADS, 4], 16 bytes of each to a load. Without SPLIT the pieces
    follow each other, and two threads share a block of 16; with it the two pieces of a pair hold the halves of THREADS
    blocks, so that a thread has whole blocks and computes their scales alone.
    """
    row = tl.program_id(0).to(tl.int64)
    if FORMAT == "nvfp4" and row >= rows:
        zero_scales(scale_ptr, row, K, THREADS)
        return
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row).to(tl.int64)  # early: it arrives together with the row
    if SOURCE == "norm" or SOURCE == "zero_centred_norm":
        if residual_ptr is not None:
            residual_ptr += row * K
        y = norm_row(
            x_ptr + row * K, residual_ptr, weight_ptr, eps, K, THREADS, SPLIT, SOURCE == "zero_centred_norm", SM
        )
    elif SOURCE == "silu":
        y = silu_row(x_ptr + row * 2 * K, K, THREADS, SPLIT, SM)
    elif SOURCE == "gelu":
        y = gelu_row(x_ptr + row * 2 * K, K, THREADS, SPLIT, SM)
    else:
        y = load_row(x_ptr + row * K, K, THREADS, SPLIT, None)
    if slots_ptr is not None and slot >= 0:
        store_row(kept_ptr + slot * K, y, K, THREADS, SPLIT)
    if FORMAT == "fp8":
        store_fp8(out_ptr + row * K, scale_ptr + row, y, K, THREADS)
    elif FORMAT == "nvfp4":
        scales = store_nvfp4(out_ptr + row * (K // 8), row_scale_ptr + row, y, None, K, THREADS, SPLIT, SM)
        for i in tl.static_range(len(scales)):
            store_scales(scale_ptr, row, i, scales[i], K, THREADS, SPLIT)
    else:
        store_qdq(out_ptr + row * K, y, K, THREADS)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def quantize_pairs(
    x_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """Plain rows to NVFP4, two to a program: r and r + 32, whose scales are neighbours in the 128x4 layout. One row's
    scales alone cost the L2 cache as many writes as its codes."""
    program = tl.program_id(0).to(tl.int64)
    row = program // 32 * 64 + program % 32
    after = row + 32
    here, there = row < rows, after < rows
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row, mask=here, other=-1).to(tl.int64)
        slot_after = tl.load(slots_ptr + after, mask=there, other=-1).to(tl.int64)
    y = load_row(x_ptr + row * K, K, THREADS, True, here)
    z = load_row(x_ptr + after * K, K, THREADS, True, there)
    if slots_ptr is not None:
        if slot >= 0:
            store_row(kept_ptr + slot * K, y, K, THREADS, True)
        if slot_after >= 0:
            store_row(kept_ptr + slot_after * K, z, K, THREADS, True)
    y_scales = store_nvfp4(out_ptr + row * (K // 8), row_scale_ptr + row, y, here, K, THREADS, True, SM)
    z_scales = store_nvfp4(out_ptr + after * (K // 8), row_scale_ptr + after, z, there, K, THREADS, True, SM)
    scale_ptr = scales_of(scale_ptr, row, K)
    for i in tl.static_range(len(y_scales)):
        pair = tl.permute(tl.reshape(tl.join(y_scales[i], z_scales[i]), [THREADS // 4, 4, 2]), (0, 2, 1))
        four = tl.arange(0, THREADS // 4)[:, None] + i * (THREADS // 4)
        byte_ptr = scale_ptr + four * 512 + tl.arange(0, 8)[None, :]
        wanted = tl.broadcast_to(four < (K + 63) // 64, [THREADS // 4, 8])
        tl.store(byte_ptr, tl.reshape(pair.to(tl.uint8), [THREADS // 4, 8]), mask=wanted)
