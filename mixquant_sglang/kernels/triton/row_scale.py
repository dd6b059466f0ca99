"""A row's own scale in NVFP4, a power of two, from the bits of its largest magnitude."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def largest_of_row(y: tl.tuple) -> tl.tensor:
    """The bits of the row's largest magnitude, at least those of infinity if the row is not finite."""
    largest = tl.abs(y[0])
    for i in tl.static_range(1, len(y)):
        largest = tl.maximum(largest, tl.abs(y[i]), propagate_nan=tl.PropagateNan.ALL)
    return tl.max(largest.to(tl.int32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def row_scale_of(largest: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """``formats.nvfp4.row_scales`` from the bits of the row's largest magnitude; and one over it, which is finite."""
    exponent = (largest >> 23) - 138 + ((largest & 0x7FFFFF) > 0x280000).to(tl.int32)
    exponent = tl.where(largest == 0, 0, tl.maximum(exponent, -126))
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < 0x7F800000, scale, float("nan")), inverse
