"""Eight E2M1 codes to a word, from BF16 pairs: below SM100 by FP16 arithmetic, from there by the instruction."""

import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.words import four_bytes, four_columns, merged_nibbles, packed_pair


@triton.jit  # type: ignore[untyped-decorator]
def eight_codes(
    words: tl.tensor, encode: tl.tensor, inverse: tl.tensor, THREADS: tl.constexpr, SM: tl.constexpr
) -> tl.tensor:
    """uint32 [THREADS]: the codes of BF16 pairs [THREADS, 4] times ``encode``, from SM100 on times ``inverse`` too."""
    a, b, c, d = four_columns(words, THREADS)
    if SM >= 100:
        first = _e2m1_pair(a, inverse, encode) | (_e2m1_pair(b, inverse, encode) << 8)
        second = _e2m1_pair(c, inverse, encode) | (_e2m1_pair(d, inverse, encode) << 8)
        return first | (second << 16)
    else:
        first = four_bytes(_code_pair(a, encode, SM), _code_pair(b, encode, SM), 0x7351, SM)
        second = four_bytes(_code_pair(c, encode, SM), _code_pair(d, encode, SM), 0x7351, SM)
        even, odd = four_bytes(first, second, 0x5410, SM), four_bytes(first, second, 0x7632, SM)
        return merged_nibbles(even >> 4, odd, SM)


@triton.jit  # type: ignore[untyped-decorator]
def half_encode(scale: tl.tensor) -> tl.tensor:
    """What to multiply magnitudes by, so that the product in FP16, rounded to one fraction bit, is the E2M1 code.

    2^-14 makes E2M1's subnormals FP16's. y has 8 bits and the scale S/8 * 2^n 4, so y/scale is either a tie of E2M1 or
    further than 1/240 from it: FP16 keeps the sides apart and swallows an approximate 1/scale, and a tie stays one. The
    reference's FP32 product leaves a tie only where 1/scale was rounded, always upwards: for S = 13 and 14 at ties that
    go up to the even code anyway, for S = 15 at all but .25, hence 2^-10 more, which FP16 swallows at .25 alone. At
    scale 0 the reference multiplies by the largest float, below 2^128: its ties go down, hence 2^-10 less.
    """
    c = tl.where((scale.to(tl.int32, bitcast=True) & 0x700000) == 0x700000, 6.109476089477539e-05, 6.103515625e-05)
    root = tl.rsqrt(scale)
    return tl.minimum(root * root * c, 2.0749025997443246e34)  # 2^114 * (1 - 2^-10)


@triton.jit  # type: ignore[untyped-decorator]
def _code_pair(word: tl.tensor, encode: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """Sign and E2M1 code of a BF16 pair, in the upper four bits of each half; below them is anything."""
    low = (word << 16).to(tl.float32, bitcast=True) * encode
    high = (word & 0xFFFF0000).to(tl.float32, bitcast=True) * encode
    pair = _clamped(packed_pair(low, high, tl.float16, SM), SM)
    pair += ((pair >> 9) & 0x00010001) + 0x00FF00FF  # to nearest even at bit 9
    return (pair << 3) | (word & 0x80008000)


@triton.jit  # type: ignore[untyped-decorator]
def _clamped(pair: tl.tensor, SM: tl.constexpr) -> tl.tensor:
    """FP16 magnitudes of at most 6 * 2^-14, E2M1's largest; NaN is that too. The sign is kept, or lost."""
    if SM < 86:
        low, high = pair & 0x7FFF, pair & 0x7FFF0000
        return tl.minimum(low, 0x0E00) | tl.minimum(high, 0x0E000000)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 six; mov.b32 six, 0x0E000E00; min.xorsign.abs.f16x2 $0, $1, six; }",
            "=r,r",
            [pair],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _e2m1_pair(word: tl.tensor, inverse: tl.tensor, encode: tl.tensor) -> tl.tensor:
    """The instruction of SM100 and later; it saturates, and keeps the sign of zero."""
    low = (word << 16).to(tl.float32, bitcast=True) * inverse * encode
    high = (word & 0xFFFF0000).to(tl.float32, bitcast=True) * inverse * encode
    return tl.inline_asm_elementwise(
        "{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, $2, $1; cvt.u32.u8 $0, c; }",
        "=r,f,f",
        [low, high],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )
