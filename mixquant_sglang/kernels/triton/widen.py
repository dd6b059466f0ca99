"""Codes of packed weights to BF16 in registers, four bytes at a time: bits go to their places in BF16, as in Marlin,
and a product with a power of two, or with a scale, brings the exponent there and gets subnormals right.

The product is an ``fma`` with minus zero, which leaves it as it is: BF16 pairs have no other before SM90.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def e4m3_to_bf16(code: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """uint8 codes -> their values, which in their places are 2^-120 times too small.  The code of NaN, which no packed
    weight has, would become 480."""
    if SM == 0:  # Triton's interpreter
        wide = code.to(tl.int32)
        bits = (((wide & 0x80) << 8) | ((wide & 0x7F) << 4)).to(tl.int16)
        return (bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * 1.329227995784916e36).to(tl.bfloat16)  # 2^120
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, power, zero;
            mov.b32 power, 0x7B807B80;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.u32 $0, a, 4;
            shr.u32 $1, b, 4;
            and.b32 $0, $0, 0x07F007F0;
            and.b32 $1, $1, 0x07F007F0;
            lop3.b32 $0, a, 0x80008000, $0, 0xEA;
            lop3.b32 $1, b, 0x80008000, $1, 0xEA;
            fma.rn.bf16x2 $0, $0, power, zero;
            fma.rn.bf16x2 $1, $1, power, zero;
            }""",
            "=&r,=&r,r",
            [code],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )


@triton.jit  # type: ignore[untyped-decorator]
def e2m1_to_bf16(code: tl.tensor, scale: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """(the low, the high nibble's) value by 2^-7.  The bits in their places are 2^-126 times the value, and ``scale``
    is 2^119 times a block's scale, as BF16 does not hold 2^126 times that."""
    if SM == 0:  # Triton's interpreter
        wide, factor = code.to(tl.int32), scale.to(tl.float32)
        low = (((wide & 0x08) << 12) | ((wide & 0x07) << 6)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (((wide & 0x80) << 8) | ((wide & 0x70) << 2)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return (low.to(tl.float32) * factor).to(tl.bfloat16), (high.to(tl.float32) * factor).to(tl.bfloat16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, s, zero;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, $4, 0, 0x1404;
            prmt.b32 b, $4, 0, 0x3424;
            shl.b32 s, a, 4;
            shr.u32 $0, a, 2;
            and.b32 $0, $0, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, $0, 0xEA;
            fma.rn.bf16x2 $0, $0, $5, zero;
            shl.b32 s, b, 4;
            shr.u32 $1, b, 2;
            and.b32 $1, $1, 0x01C001C0;
            lop3.b32 $1, s, 0x80008000, $1, 0xEA;
            fma.rn.bf16x2 $1, $1, $6, zero;
            shr.u32 $2, a, 6;
            and.b32 $2, $2, 0x01C001C0;
            lop3.b32 $2, a, 0x80008000, $2, 0xEA;
            fma.rn.bf16x2 $2, $2, $5, zero;
            shr.u32 $3, b, 6;
            and.b32 $3, $3, 0x01C001C0;
            lop3.b32 $3, b, 0x80008000, $3, 0xEA;
            fma.rn.bf16x2 $3, $3, $6, zero;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r",
            [code, scale],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )


@triton.jit  # type: ignore[untyped-decorator]
def e4m3_pairs(word: tl.tensor, SM: tl.constexpr) -> tl.tuple:
    """int32 words of four codes -> ``e4m3_to_bf16`` in words: of the first and second, of the third and fourth."""
    if SM == 0:  # Triton's interpreter
        return _e4m3_pair(word), _e4m3_pair(word >> 16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, power, zero;
            mov.b32 power, 0x7B807B80;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, $2, 0, 0x1404;
            prmt.b32 b, $2, 0, 0x3424;
            shr.u32 $0, a, 4;
            shr.u32 $1, b, 4;
            and.b32 $0, $0, 0x07F007F0;
            and.b32 $1, $1, 0x07F007F0;
            lop3.b32 $0, a, 0x80008000, $0, 0xEA;
            lop3.b32 $1, b, 0x80008000, $1, 0xEA;
            fma.rn.bf16x2 $0, $0, power, zero;
            fma.rn.bf16x2 $1, $1, power, zero;
            }""",
            "=&r,=&r,r",
            [word],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]
def e2m1_pairs(word: tl.tensor, scale: tl.tensor, SM: tl.constexpr) -> tl.tuple:
    """int32 words of four bytes -> ``e2m1_to_bf16`` in words: of the low nibbles of the first and second byte, of the
    third and fourth, and of their high nibbles.  ``scale``: int32, its BF16 twice."""
    if SM == 0:  # Triton's interpreter
        first, second = _e2m1_pair(word, scale), _e2m1_pair(word >> 16, scale)
        return first[0], second[0], first[1], second[1]
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, s, zero;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, $4, 0, 0x1404;
            prmt.b32 b, $4, 0, 0x3424;
            shl.b32 s, a, 4;
            shr.u32 $0, a, 2;
            and.b32 $0, $0, 0x01C001C0;
            lop3.b32 $0, s, 0x80008000, $0, 0xEA;
            fma.rn.bf16x2 $0, $0, $5, zero;
            shl.b32 s, b, 4;
            shr.u32 $1, b, 2;
            and.b32 $1, $1, 0x01C001C0;
            lop3.b32 $1, s, 0x80008000, $1, 0xEA;
            fma.rn.bf16x2 $1, $1, $5, zero;
            shr.u32 $2, a, 6;
            and.b32 $2, $2, 0x01C001C0;
            lop3.b32 $2, a, 0x80008000, $2, 0xEA;
            fma.rn.bf16x2 $2, $2, $5, zero;
            shr.u32 $3, b, 6;
            and.b32 $3, $3, 0x01C001C0;
            lop3.b32 $3, b, 0x80008000, $3, 0xEA;
            fma.rn.bf16x2 $3, $3, $5, zero;
            }""",
            "=&r,=&r,=&r,=&r,r,r",
            [word, scale],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _e4m3_pair(word: tl.tensor) -> tl.tensor:
    return _pair(e4m3_to_bf16(word & 0xFF, 0), e4m3_to_bf16((word >> 8) & 0xFF, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _e2m1_pair(word: tl.tensor, scale: tl.tensor) -> tl.tuple:
    factor = scale.to(tl.int16).to(tl.bfloat16, bitcast=True)
    low, high = e2m1_to_bf16(word & 0xFF, factor, 0)
    next_low, next_high = e2m1_to_bf16((word >> 8) & 0xFF, factor, 0)
    return _pair(low, next_low), _pair(high, next_high)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    return (low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
