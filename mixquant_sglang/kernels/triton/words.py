"""32-bit words that hold a pair of BF16 or FP16, and their bytes: what one PTX instruction does for all of a word.

``SM`` is 0 in Triton's interpreter, which has no inline PTX.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def floats(words: tl.tensor, THREADS: tl.constexpr) -> tl.tensor:
    """FP32 [THREADS, 8] of the BF16 pairs in ``words`` [THREADS, 4], one instruction for each."""
    low, high = (words << 16).to(tl.float32, bitcast=True), (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [THREADS, 8])


@triton.jit  # type: ignore[untyped-decorator]
def all_floats(row: tl.tuple, THREADS: tl.constexpr) -> tl.tuple:
    y: tl.tuple = ()
    for i in tl.static_range(len(row)):
        y += (floats(row[i], THREADS),)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def bf16_pairs(y: tl.tensor, THREADS: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """FP32 [THREADS, 8] rounded to BF16 pairs."""
    low, high = tl.split(tl.reshape(y, [THREADS, 4, 2]))
    return packed_pair(low, high, tl.bfloat16, SM)


@triton.jit  # type: ignore[untyped-decorator]
def packed_pair(low: tl.tensor, high: tl.tensor, FORMAT: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """Two FP32 to the halves of a word, rounded to FP16 or BF16: one instruction, where Triton's conversions take
    two slow ones and two to put the halves together."""
    if SM == 0:
        low = low.to(FORMAT).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (high.to(FORMAT).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    elif FORMAT.is_fp16():
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[untyped-decorator]
def four_columns(words: tl.tensor, THREADS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The columns of ``words`` [THREADS, 4]."""
    even, odd = tl.split(tl.reshape(words, [THREADS, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit  # type: ignore[untyped-decorator]
def larger_pair(a: tl.tensor, b: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """The larger magnitudes of two BF16 pairs, with any sign; NaN is larger than anything."""
    if SM < 86:
        high = tl.maximum((a & 0x7FFF0000).to(tl.int32, bitcast=True), (b & 0x7FFF0000).to(tl.int32, bitcast=True))
        low = tl.maximum((a & 0x7FFF).to(tl.int32, bitcast=True), (b & 0x7FFF).to(tl.int32, bitcast=True))
        return (high | low).to(tl.uint32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.jit  # type: ignore[untyped-decorator]
def four_bytes(a: tl.tensor, b: tl.tensor, SELECTOR: tl.constexpr, SM: tl.constexpr) -> tl.tensor:
    """Four of the eight bytes of a and b, as PTX's prmt numbers them."""
    if SM == 0:
        result = a & 0
        for i in tl.static_range(4):
            byte: tl.constexpr = SELECTOR >> (4 * i) & 7
            result |= (((b if byte >= 4 else a) >> (byte % 4 * 8)) & 0xFF) << (8 * i)
        return result
    elif SELECTOR == 0x7351:
        return _prmt(a, b, "prmt.b32 $0, $1, $2, 0x7351;")
    elif SELECTOR == 0x5410:
        return _prmt(a, b, "prmt.b32 $0, $1, $2, 0x5410;")
    else:
        tl.static_assert(SELECTOR == 0x7632)
        return _prmt(a, b, "prmt.b32 $0, $1, $2, 0x7632;")


@triton.jit  # type: ignore[untyped-decorator]
def merged_nibbles(low: tl.tensor, high: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """The lower four bits of each byte of ``low`` and the upper ones of ``high``."""
    if SM == 0:
        return (low & 0x0F0F0F0F) | (high & 0xF0F0F0F0)
    else:
        return _prmt(low, high, "lop3.b32 $0, $1, $2, 0x0F0F0F0F, 0xE4;")


@triton.jit  # type: ignore[untyped-decorator]
def _prmt(a: tl.tensor, b: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)
