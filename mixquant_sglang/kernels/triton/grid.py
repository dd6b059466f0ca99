"""E4M3 and E2M1 in FP32 arithmetic: magnitudes rounded to their grids, codes, and the scale to encode with.

The numbers are those of ``formats/nvfp4.py``.  A code becomes FP32 and back by a power of two, which gets the small
format's subnormals right.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def to_e2m1(x: tl.tensor) -> tl.tensor:
    """x >= 0 to the nearest magnitude of E2M1, saturating; FP32."""
    return _round_to_grid(tl.minimum(x, 6.0), 1, 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def to_e4m3(x: tl.tensor) -> tl.tensor:
    """x >= 0 to the nearest number of E4M3, saturating; FP32."""
    return _round_to_grid(tl.minimum(x, 448.0), 3, 0.015625)


@triton.jit  # type: ignore[untyped-decorator]
def block_scale_of(largest: tl.tensor) -> tl.tensor:
    """On the E4M3 grid, in FP32, from a block's largest magnitude."""
    return to_e4m3(largest * 0.16666667163372040)


@triton.jit  # type: ignore[untyped-decorator]
def encode_scale(scale: tl.tensor) -> tl.tensor:
    """What magnitudes are multiplied by: 1/scale, finite."""
    return tl.minimum(tl.div_rn(1.0, scale), 3.4028234663852886e38)


@triton.jit  # type: ignore[untyped-decorator]
def e4m3_code(scale: tl.tensor) -> tl.tensor:
    """int32: the code of a number >= 0 on the E4M3 grid."""
    return (scale * 7.52316384526264e-37).to(tl.int32, bitcast=True) >> 20  # 2^-120


@triton.jit  # type: ignore[untyped-decorator]
def e4m3_value(code: tl.tensor) -> tl.tensor:
    """FP32 of an int32 code of E4M3 without a sign."""
    return (code << 20).to(tl.float32, bitcast=True) * 1.3292279957849159e36  # 2^120


@triton.jit  # type: ignore[untyped-decorator]
def e2m1_code(value: tl.tensor) -> tl.tensor:
    """int32: the code of a magnitude on the E2M1 grid."""
    return (value * 1.1754943508222875e-38).to(tl.int32, bitcast=True) >> 22  # 2^-126


@triton.jit  # type: ignore[untyped-decorator]
def _round_to_grid(x: tl.tensor, FRACTION_BITS: tl.constexpr, LEAST_NORMAL: tl.constexpr) -> tl.tensor:
    """x >= 0 to the nearest float of a small format, ties to even: adding and subtracting 1.5 * 2^23 steps of its grid
    rounds to them. Below the format's least normal the steps stay as they are there."""
    exponent = tl.maximum(x, LEAST_NORMAL).to(tl.int32, bitcast=True) & 0x7F800000
    shift = (exponent + (((23 - FRACTION_BITS) << 23) | 0x400000)).to(tl.float32, bitcast=True)
    return (x + shift) - shift
