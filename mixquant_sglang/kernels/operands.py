"""Activations on their way into a low-precision GEMM: the operand that it takes, and the BF16 rows that are protected.

One format serves all kernels of a precision:

| format | operand |
|---|---|
| "fp8" | codes float8_e4m3fn [M, K], scales float32 [M, 1] |
| "nvfp4" | codes uint8 [M, K/2], scales float8_e4m3fn as ``formats/scale_layout.py`` says, row scales float32 [M] |
| "qdq" | NVFP4 values as bfloat16 [M, K] (``formats.nvfp4.quantize_activations(x).dequantize()``) |

On CUDA our Triton kernels make them, alone or fused with the RMSNorm, SiLU or GELU x up before them; elsewhere plain
torch does.  The numbers are the same (``kernels/triton/activations.py`` says where a norm's last bit can differ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from mixquant_sglang.formats import fp8, nvfp4, scale_layout

if TYPE_CHECKING:
    from mixquant_sglang.kernels.rows import Rows


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedActivations:
    """Stands where SGLang would pass the BF16 matrix ``shape`` = [M, K] from a norm or activation to a linear.

    The matrix itself was never written, so this is no tensor: whatever reads it, other than the linear that it was made
    for, gets an error.  ``kept`` bfloat16 [R, K] are the protected rows.
    """

    operand: tuple[torch.Tensor, ...]
    kept: torch.Tensor | None
    shape: torch.Size
    fmt: str

    @classmethod
    def __torch_function__(cls, function: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError(
            f"{getattr(function, '__name__', function)} got activations that exist in low precision alone, because "
            "mixquant fused their quantisation for one linear; report this model, and until then set "
            "'prefill: {fuse: false}' in the recipe"
        )


def quantize(x: torch.Tensor, fmt: str, rows: Rows | None = None) -> QuantizedActivations:
    """BF16 [M, K], contiguous, M >= 0; keeps the rows that ``rows`` protects."""
    if x.is_cuda:
        from mixquant_sglang.kernels.triton import activations

        slots, kept = _kept(x, x.shape[1], rows)
        return QuantizedActivations(activations.quantize(x, fmt, slots=slots, kept=kept), kept, x.shape, fmt)
    kept = rows.gather(x) if rows is not None else None
    return QuantizedActivations(_reference(x, fmt), kept, x.shape, fmt)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    fmt: str,
    residual: torch.Tensor | None = None,
    rows: Rows | None = None,
    *,
    zero_centred: bool = False,
) -> QuantizedActivations:
    """CUDA only.  RMSNorm of ``x`` [M, K], or of ``x + residual``, which is then ``residual``'s new value; with
    ``zero_centred`` by ``1 + weight``."""
    from mixquant_sglang.kernels.triton import activations

    slots, kept = _kept(x, x.shape[1], rows)
    operand = activations.rmsnorm(
        x, weight, eps, fmt, zero_centred=zero_centred, residual=residual, slots=slots, kept=kept
    )
    return QuantizedActivations(operand, kept, x.shape, fmt)


def activation_mul(source: str, gate_up: torch.Tensor, fmt: str, rows: Rows | None = None) -> QuantizedActivations:
    """CUDA only.  ``source`` "silu" or "gelu", the tanh approximation: of gate, x up, of ``gate_up`` [M, 2K]."""
    from mixquant_sglang.kernels.triton import activations

    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    slots, kept = _kept(gate_up, k, rows)
    multiply = {"silu": activations.silu_mul, "gelu": activations.gelu_mul}[source]
    operand = multiply(gate_up, fmt, slots=slots, kept=kept)
    return QuantizedActivations(operand, kept, torch.Size((m, k)), fmt)


def gather(x: QuantizedActivations, rows: Rows) -> tuple[torch.Tensor, ...]:
    """The operand [R, K] of some of its rows."""
    if x.fmt != "nvfp4":
        return tuple(_gather(tensor, rows) for tensor in x.operand)
    packed, swizzled, row_scales = x.operand
    block_scales = _gather(scale_layout.unswizzle_scales(swizzled, *x.shape), rows)
    return _gather(packed, rows), scale_layout.swizzle_scales(block_scales), _gather(row_scales[:, None], rows)[:, 0]


def _gather(matrix: torch.Tensor, rows: Rows) -> torch.Tensor:
    if matrix.dtype is torch.float8_e4m3fn:  # torch and Triton index bytes
        return rows.gather(matrix.view(torch.uint8)).view(matrix.dtype)
    return rows.gather(matrix)


def _kept(x: torch.Tensor, k: int, rows: Rows | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if rows is None:
        return None, None
    return rows.slots, x.new_empty(rows.index.shape[0], k)


def _reference(x: torch.Tensor, fmt: str) -> tuple[torch.Tensor, ...]:
    if fmt == "fp8":
        packed = fp8.quantize_activations(x)
        return packed.data, packed.scales[:, None]
    if fmt == "nvfp4":
        q = nvfp4.quantize_activations(x)
        return q.packed, scale_layout.swizzle_scales(q.block_scales), q.row_scales
    if fmt == "qdq":
        return (nvfp4.quantize_activations(x).dequantize(),)
    raise ValueError(f"unknown activation format {fmt!r}")
