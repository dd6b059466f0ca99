"""A BF16 row in registers: how it is cut into pieces, and how they are loaded and stored.

A row of K elements is a tuple of pieces, BF16 pairs in uint32 [THREADS, 4], 16 bytes of each to a load.  Without SPLIT
the pieces follow each other; with it the two pieces of a pair hold the halves of THREADS blocks of 16.
"""

import triton
import triton.language as tl


@triton.constexpr_function  # type: ignore[untyped-decorator]
def pieces_of(K: int, THREADS: int, SPLIT: bool) -> int:
    return 2 * ((K + THREADS * 16 - 1) // (THREADS * 16)) if SPLIT else (K + THREADS * 8 - 1) // (THREADS * 8)


@triton.jit  # type: ignore[untyped-decorator]
def eighth(i: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr) -> tl.tensor:
    """Where a row's i-th piece lies, in units of eight elements: int32 [THREADS]."""
    thread = tl.arange(0, THREADS)
    return thread * 2 + begin(i, THREADS, SPLIT) if SPLIT else thread + begin(i, THREADS, SPLIT)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def begin(i: int, THREADS: int, SPLIT: bool) -> int:
    """Where the first thread's share of a row's i-th piece lies, in units of eight elements."""
    return i // 2 * THREADS * 2 + i % 2 if SPLIT else i * THREADS


@triton.constexpr_function  # type: ignore[untyped-decorator]
def whole(i: int, K: int, THREADS: int, SPLIT: bool) -> bool:
    """Whether a row's i-th piece ends before column K."""
    return (i // 2 + 1) * THREADS * 16 <= K if SPLIT else (i + 1) * THREADS * 8 <= K


@triton.jit  # type: ignore[untyped-decorator]
def _word_ptr(row_ptr: tl.tensor, i: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr) -> tl.tensor:
    """What differs between pieces comes last, as a constant: a part of the load, not an addition of 64 bits."""
    column = eighth(0, THREADS, SPLIT)[:, None] * 4 + tl.arange(0, 4)[None, :]
    return row_ptr.to(tl.pointer_type(tl.uint32)) + column + begin(i, THREADS, SPLIT) * 4


@triton.jit  # type: ignore[untyped-decorator]
def load_piece(
    row_ptr: tl.tensor, i: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, live: tl.tensor
) -> tl.tensor:
    word_ptr = _word_ptr(row_ptr, i, THREADS, SPLIT)
    if whole(i, K, THREADS, SPLIT):
        return tl.load(word_ptr) if live is None else tl.load(word_ptr, mask=live, other=0)
    else:
        wanted = both(eighth(i, THREADS, SPLIT)[:, None] < K // 8, live)
        return tl.load(word_ptr, mask=wanted, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def store_piece(row_ptr: tl.tensor, i: tl.constexpr, value: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr) -> None:
    """The i-th piece [THREADS, 8] of a row that is not SPLIT."""
    column = eighth(0, THREADS, False)[:, None] * 8 + tl.arange(0, 8)[None, :]
    value_ptr = row_ptr + column + begin(i, THREADS, False) * 8
    if whole(i, K, THREADS, False):
        tl.store(value_ptr, value)
    else:
        tl.store(value_ptr, value, mask=eighth(i, THREADS, False)[:, None] < K // 8)


@triton.jit  # type: ignore[untyped-decorator]
def both(wanted: tl.tensor, live: tl.tensor) -> tl.tensor:
    return wanted if live is None else wanted & live


@triton.jit  # type: ignore[untyped-decorator]
def load_row(
    row_ptr: tl.tensor, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr, live: tl.tensor
) -> tl.tuple:
    """A BF16 row; it is zero beyond K, and where it is not ``live``, a bool or None for true."""
    row: tl.tuple = ()
    for i in tl.static_range(pieces_of(K, THREADS, SPLIT)):
        row += (load_piece(row_ptr, i, K, THREADS, SPLIT, live),)
    return row


@triton.jit  # type: ignore[untyped-decorator]
def store_row(row_ptr: tl.tensor, row: tl.tuple, K: tl.constexpr, THREADS: tl.constexpr, SPLIT: tl.constexpr) -> None:
    for i in tl.static_range(len(row)):
        word_ptr = _word_ptr(row_ptr, i, THREADS, SPLIT)
        if whole(i, K, THREADS, SPLIT):
            tl.store(word_ptr, row[i])
        else:
            tl.store(word_ptr, row[i], mask=eighth(i, THREADS, SPLIT)[:, None] < K // 8)
