"""Quantisation is fused into what comes before a linear: RMSNorm, residual add + RMSNorm, SiLU or GELU x up.

In most blocks the result of these has one reader, the next linear.  If that linear quantises its input anyway,
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
from mixquant_sglang.layers.blocks import fusable_method, is_decoder, is_mlp, norms, takes_q_apart
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.versions.dialect import dialect


class FusedNorm:
    """Takes the place of an RMSNorm's forward method.  ``source``: its kernel, "norm" or "zero_centred_norm"."""

    def __init__(self, norm: Any, linear: MixQuantLinearMethod, source: str) -> None:
        self._norm = norm
        self.linear = linear
        self.source = source
        self.plain = dialect().forward_method(norm)
        self._eps: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
    ) -> Any:
        if current().role is not Role.PROMPT:  # asked first: a BF16 pass without a graph waits for the host
            return call_norm(self.plain, x, residual, post_residual_addition)
        plain = not _rows(x) or post_residual_addition is not None or (residual is not None and not _rows(residual))
        fusable = None if plain else self.linear.fusable(x.shape[0])
        if fusable is None:
            return call_norm(self.plain, x, residual, post_residual_addition)
        fmt, rows = fusable
        if x.is_cuda:
            weight, zero_centred = self._norm.weight.data, self.source == "zero_centred_norm"
            y = operands.rmsnorm(x, weight, self._eps, fmt, residual, rows, zero_centred=zero_centred)
            return y if residual is None else (y, residual)
        plain_y = call_norm(self.plain, x, residual)
        if residual is None:
            return operands.quantize(plain_y, fmt, rows)
        return operands.quantize(plain_y[0], fmt, rows), plain_y[1]


class FusedActivation:
    """Takes the place of the forward method of SiluAndMul or GeluAndMul.  ``source``: its kernel, "silu" or "gelu"."""

    def __init__(self, act: Any, linear: MixQuantLinearMethod, source: str) -> None:
        self.linear = linear
        self.source = source
        self.plain = dialect().forward_method(act)

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor | QuantizedActivations:
        if current().role is not Role.PROMPT:
            return self.plain(gate_up)  # type: ignore[no-any-return]
        fusable = self.linear.fusable(gate_up.shape[0]) if _rows(gate_up) else None
        if fusable is None:
            return self.plain(gate_up)  # type: ignore[no-any-return]
        fmt, rows = fusable
        if gate_up.is_cuda:
            return operands.activation_mul(self.source, gate_up, fmt, rows)
        return operands.quantize(self.plain(gate_up), fmt, rows)


def call_norm(
    method: Any, x: torch.Tensor, residual: torch.Tensor | None = None, addition: torch.Tensor | None = None
) -> Any:
    """``method`` of a norm with a residual and an addition to it, where there are any: not every norm takes both.

    They are handed here by position or by name (versions/v0_5_*.py), and taken by position in all."""
    if addition is not None:
        return method(x, residual, addition)
    return method(x) if residual is None else method(x, residual)


def plain_method(op: Any) -> Any:
    """What SGLang had installed: it takes and gives BF16."""
    method = dialect().forward_method(op)
    return method.plain if isinstance(method, (FusedNorm, FusedActivation)) else method


def _rows(x: torch.Tensor) -> bool:
    """Whether it is what the fused kernels take: at least one token row, BF16, without gaps."""
    return x.ndim == 2 and x.shape[0] > 0 and x.dtype is torch.bfloat16 and x.is_contiguous()


def fuse(model: torch.nn.Module) -> Counter[str]:
    """Installs the fused forms; call it once, after the weights were packed.  Returns how many of each kind."""
    fused: Counter[str] = Counter()
    for layer in model.modules():
        if is_decoder(layer):
            for norm, linear in norms(layer):
                source = norm_source(norm)
                if source:
                    norm._forward_method = FusedNorm(norm, linear, source)
                    fused["RMSNorm"] += 1
        elif is_mlp(layer):
            act: Any = layer.act_fn
            method, source = fusable_method(layer.down_proj), activation_source(act)
            if method and source:
                act._forward_method = FusedActivation(act, method, source)
                fused["SiLU" if source == "silu" else "GELU"] += 1
        elif takes_q_apart(layer):
            attention: Any = layer
            method = fusable_method(attention.qkv_proj)
            if method and method.split_columns(int(attention.q_size)):
                fused["q projections"] += 1
    return fused


def _is_default(op: Any) -> bool:
    """Whether it runs what SGLang runs by default on CUDA and the CPU."""
    return getattr(dialect().forward_method(op), "__name__", "") in ("forward_cuda", "forward_native")


def activation_source(act: Any) -> str | None:
    """The kernel that follows the numbers of SGLang's default for ``act``, if there is one."""
    kind = type(act).__name__
    if kind == "SiluAndMul" and _is_default(act):
        return "silu"
    if kind == "GeluAndMul" and _is_default(act) and act.approximate == "tanh":
        return "gelu"
    return None


def norm_source(norm: Any) -> str | None:
    """The kernel that follows the numbers of SGLang's default for ``norm``, if there is one."""
    kind = type(norm).__name__
    if kind in ("GemmaRMSNorm", "Gemma3RMSNorm"):
        return "zero_centred_norm" if _is_default(norm) and norm.weight.dtype is torch.bfloat16 else None
    return "norm" if kind == "RMSNorm" and _plain_rmsnorm(norm) else None


def _plain_rmsnorm(norm: Any) -> bool:
    """Whether SGLang runs it as its default RMSNorm kernel, whose numbers the fused one follows."""
    return (
        _is_default(norm)
        and norm.has_weight
        and norm.weight.dtype is torch.bfloat16
        and not norm.cast_x_before_out_mul
        and not norm.fp32_residual
        and norm.override_orig_dtype is None
        and norm.variance_size_override is None
    )
