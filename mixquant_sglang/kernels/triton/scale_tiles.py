"""Block scales in the 128x4 layout of ``formats.scale_layout.swizzle_scales``."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def store_scales(
    scale_ptr: tl.tensor,
    row: tl.tensor,
    i: tl.constexpr,
    byte: tl.tensor,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Scales of the i-th THREADS blocks, or half as many where they are not SPLIT, in the 128x4 layout; those that pad
    K/16 to a multiple of four are zero because ``load_piece`` is zero beyond K."""
    padded: tl.constexpr = (K + 63) // 64 * 4
    thread = tl.arange(0, THREADS)
    scale_ptr = scales_of(scale_ptr, row, K)
    blocks: tl.constexpr = THREADS if SPLIT else THREADS // 2
    if SPLIT:
        block = thread
        wanted = i * blocks + block < padded
    else:  # two threads share a block; in any other order this goes through shared memory
        block = thread // 2
        byte = tl.reshape(tl.broadcast_to(byte[:, None], [blocks, 2]), [THREADS])
        wanted = (thread % 2 == 0) & (i * blocks + block < padded)
    byte_ptr = scale_ptr + (block // 4 * 512 + block % 4) + i * blocks * 128
    if SPLIT and (i + 1) * blocks <= padded:
        tl.store(byte_ptr, byte.to(tl.uint8))
    else:
        tl.store(byte_ptr, byte.to(tl.uint8), mask=wanted)


@triton.jit  # type: ignore[untyped-decorator]
def zero_scales(scale_ptr: tl.tensor, row: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    for i in tl.static_range((K // 16 + THREADS - 1) // THREADS):
        store_scales(scale_ptr, row, i, tl.zeros([THREADS], tl.int32), K, THREADS, True)


@triton.jit  # type: ignore[untyped-decorator]
def scales_of(scale_ptr: tl.tensor, row: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """Where the first block scale of ``row`` lies in the 128x4 layout."""
    return scale_ptr + row // 128 * ((K + 63) // 64 * 512) + row % 32 * 16 + row % 128 // 32 * 4
