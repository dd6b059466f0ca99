"""Which class runs a precision with a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixquant_sglang.kernels.linear.base import PackedLinear


def packed_linear(precision: str, kernel: str) -> type[PackedLinear]:
    """The class that packs weights in ``precision`` for ``kernel``."""
    if kernel == "emulated":
        from mixquant_sglang.kernels.linear.emulated import EmulatedFP8, EmulatedNVFP4

        return EmulatedNVFP4 if precision == "nvfp4" else EmulatedFP8
    if precision == "nvfp4":
        from mixquant_sglang.kernels.linear.native_nvfp4 import NativeNVFP4

        return NativeNVFP4
    from mixquant_sglang.kernels.linear.native_fp8 import NativeFP8

    return NativeFP8
