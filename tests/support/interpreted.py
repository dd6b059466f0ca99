"""What SGLang's Triton code needs where Triton's interpreter runs it on a CPU (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
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


def _wide(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of the nearest BF16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _know_bf16() -> None:
    """The interpreter keeps BF16 as integers, and adds and multiplies these; and its rounding to BF16 loses carries."""
    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    convert = interpreter._convert_float

    def widened(value: Any) -> Any:
        is_bf16 = value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16  # a comparison has its name too
        return handle(_wide(value.data), tl.float32) if is_bf16 else value

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return _wide(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return _narrow(data.view(np.float32))
        return convert(data, source, target, rounding)

    def on_floats(operation: Any) -> Any:
        def operate(self: Any, *operands: Any) -> Any:
            *values, function = operands
            out = operation(self, *map(widened, values), function)
            if values[-1].dtype.scalar != tl.bfloat16:
                return out
            data = _narrow(out.data) if out.data.dtype == np.float32 else out.data
            return handle(data, tl.bfloat16)

        return operate

    def dot(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        return create_dot(self, widened(a), widened(b), d, *more)

    create_dot, builder.create_dot = builder.create_dot, dot
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, on_floats(getattr(builder, name)))
    interpreter._convert_float = convert_float


def prepare() -> None:
    """Of several launch configurations the first one is taken, untimed."""
    _know_bf16()
    Autotuner._bench = lambda _self, *_args, **_kwargs: 0.0
    torch.cpu.device = lambda _index: nullcontext()  # type: ignore[attr-defined]
    torch.get_device_module = lambda _device=None: torch.cpu
    from sglang.kernels.ops.attention.fla import op

    for function in (exp, exp2, log, log2):
        setattr(op, function.fn.__name__, function)
    from sglang.kernels.ops.attention.fla import layernorm_gated

    layernorm_gated._get_sm_count = lambda _device: 1
