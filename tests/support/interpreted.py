"""What SGLang's Triton code needs where Triton's interpreter runs it on a CPU (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner


# The interpreter replaces functions of ``tl``, not other names for them.
@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    return tl.exp(x)


@triton.jit
def exp2(x):  # type: ignore[no-untyped-def]
    return tl.math.exp2(x)


@triton.jit
def log(x):  # type: ignore[no-untyped-def]
    return tl.log(x)


@triton.jit
def log2(x):  # type: ignore[no-untyped-def]
    return tl.log2(x)


def prepare() -> None:
    """Of several launch configurations the first one is taken, untimed."""
    Autotuner._bench = lambda _self, *_args, **_kwargs: 0.0
    torch.cpu.device = lambda _index: nullcontext()  # type: ignore[attr-defined]
    torch.get_device_module = lambda _device=None: torch.cpu
    from sglang.kernels.ops.attention.fla import op

    for function in (exp, exp2, log, log2):
        setattr(op, function.fn.__name__, function)
    from sglang.kernels.ops.attention.fla import layernorm_gated

    layernorm_gated._get_sm_count = lambda _device: 1
