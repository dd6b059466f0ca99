"""BF16 linears that add as the CPU's kernels of packed weights do, so that their bits can be compared.

Torch's BF16 product adds in an order, and with roundings, of its own. FP32 products of the same values have one order,
and where scales are powers of two it does not matter whether they are in the values or applied to the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def fp32_sums(asked: bool) -> Iterator[None]:
    """While it lasts, and if ``asked``, SGLang's BF16 linears are one FP32 sum, rounded once, with the bias in it."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    def apply(_method: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        total = x.float() @ layer.weight.float().t()
        return (total if bias is None else total + bias).to(x.dtype)

    stock = UnquantizedLinearMethod.apply
    if asked:
        UnquantizedLinearMethod.apply = apply
    try:
        yield
    finally:
        UnquantizedLinearMethod.apply = stock
