"""Quantisation is fused into what comes before a linear: RMSNorm, residual add + RMSNorm, SiLU x up.

In Llama-like blocks the result of these has one reader, the next linear.  If that linear quantises its input anyway,
the BF16 matrix need not be written and read back: the norm or activation hands over ``QuantizedActivations`` instead.
This saves 4 of 11 bytes for each element of a norm with residual, 4 of 9 for each of an activation (FP8).

Only blocks whose source we know are fused (``blocks.py``), and only where nothing about the norm is special.
Anything that would read the missing BF16 matrix gets an error, not garbage.  Decode, and passes that run whole in BF16,
call the very method that SGLang had installed.  What is replaced is one attribute of each norm and activation object,
``MultiPlatformOp._forward_method``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.layers.blocks import fusable_method, is_attention, is_decoder, is_mlp, norms
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.versions.dialect import dialect


class FusedRMSNorm:
    """Takes the place of an RMSNorm's forward method."""

    def __init__(self, norm: Any, linear: MixQuantLinearMethod) -> None:
        self._norm = norm
        self.linear = linear
        self.plain = dialect().forward_method(norm)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
    ) -> Any:
        plain = not _rows(x) or post_residual_addition is not None or (residual is not None and not _rows(residual))
        fusable = None if plain else self.linear.fusable(x.shape[0])
        if fusable is None:
            # handed here by position or by name (versions/v0_5_*.py), taken by position in all
            extra = () if post_residual_addition is None else (post_residual_addition,)
            return self.plain(x, residual, *extra)
        fmt, rows = fusable
        if x.is_cuda:
            norm = self._norm
            y = operands.rmsnorm(x, norm.weight.data, norm.variance_epsilon, fmt, residual, rows)
            return y if residual is None else (y, residual)
        plain_y = self.plain(x, residual)
        if residual is None:
            return operands.quantize(plain_y, fmt, rows)
        return operands.quantize(plain_y[0], fmt, rows), plain_y[1]


class FusedSiluAndMul:
    """Takes the place of a SiluAndMul's forward method."""

    def __init__(self, act: Any, linear: MixQuantLinearMethod) -> None:
        self.linear = linear
        self.plain = dialect().forward_method(act)

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor | QuantizedActivations:
        fusable = self.linear.fusable(gate_up.shape[0]) if _rows(gate_up) else None
        if fusable is None:
            return self.plain(gate_up)  # type: ignore[no-any-return]
        fmt, rows = fusable
        if gate_up.is_cuda:
            return operands.silu_mul(gate_up, fmt, rows)
        return operands.quantize(self.plain(gate_up), fmt, rows)


def plain_method(op: Any) -> Any:
    """What SGLang had installed: it takes and gives BF16."""
    method = dialect().forward_method(op)
    return method.plain if isinstance(method, (FusedRMSNorm, FusedSiluAndMul)) else method


def _rows(x: torch.Tensor) -> bool:
    """Whether it is what the fused kernels take: at least one token row, BF16, without gaps."""
    return x.ndim == 2 and x.shape[0] > 0 and x.dtype is torch.bfloat16 and x.is_contiguous()


def fuse(model: torch.nn.Module) -> Counter[str]:
    """Installs the fused forms; call it once, after the weights were packed.  Returns how many of each kind."""
    fused: Counter[str] = Counter()
    for layer in model.modules():
        if is_decoder(layer):
            for norm, linear in norms(layer):
                if _plain_rmsnorm(norm):
                    norm._forward_method = FusedRMSNorm(norm, linear)
                    fused["RMSNorm"] += 1
        elif is_mlp(layer):
            act: Any = layer.act_fn
            method = fusable_method(layer.down_proj)
            if method and type(act).__name__ == "SiluAndMul" and _is_default(act):
                act._forward_method = FusedSiluAndMul(act, method)
                fused["SiLU"] += 1
        elif is_attention(layer):
            method = fusable_method(layer.qkv_proj)
            if method and method.split_columns(int(layer.q_size)):  # type: ignore[arg-type]
                fused["q projections"] += 1
    return fused


def _is_default(op: Any) -> bool:
    """Whether it runs what SGLang runs by default on CUDA and the CPU."""
    return getattr(dialect().forward_method(op), "__name__", "") in ("forward_cuda", "forward_native")


def _plain_rmsnorm(norm: Any) -> bool:
    """Whether SGLang runs it as its default RMSNorm kernel, whose numbers the fused one follows."""
    return (
        type(norm).__name__ == "RMSNorm"
        and _is_default(norm)
        and norm.has_weight
        and norm.weight.dtype is torch.bfloat16
        and not norm.cast_x_before_out_mul
        and not norm.fp32_residual
        and norm.override_orig_dtype is None
        and norm.variance_size_override is None
    )
