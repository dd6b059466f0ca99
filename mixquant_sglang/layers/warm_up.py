"""No kernel of ours is compiled while a request waits: at load, every linear and fused module runs once for each kind
of pass (``kernels/triton/warm_up.py``)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.fused import FusedActivation, FusedNorm
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY
from mixquant_sglang.recipe.roles import Role

if TYPE_CHECKING:
    from mixquant_sglang.kernels.linear.base import PackedLinear


def warm_up(
    model: torch.nn.Module,
    methods: Sequence[MixQuantLinearMethod],
    experts: Sequence[MixQuantExpertsMethod],
    rows: Sequence[int],
    device: torch.device,
) -> str:
    """What was compiled, for the log; call it once, on a GPU, after fusion and after the GEMMs were chosen.

    ``rows``: of passes, each of a kind of its own for experts."""
    from mixquant_sglang.kernels.triton import warm_up as kernels

    begin, before = time.perf_counter(), kernels.compiled()
    done: set[tuple[object, ...]] = set()

    def new(*what: object) -> bool:
        known = what in done
        done.add(what)
        return not known

    for method in methods:
        n, k = method.shape
        bias = method.bias
        for precision in sorted(method.low):
            packed = method.copy_in(precision)
            parts = _parts(packed)
            for each in (None, bias) if method.invariant else (None,):  # of which a bias is a kind of its own
                if new("product", precision, parts, each is None):
                    packed.matmul(torch.zeros(kernels.ROWS, k, dtype=torch.bfloat16, device=device), each)
            fmt = packed.activation_format
            if fmt and new("rows", fmt, k, method.split):
                kernels.quantise("rows", k, fmt, device, protects=method.split)
        for precision in sorted(WEIGHT_ONLY.keys() & method.low):
            packed = method.copy_in(precision)
            for cut in {0, method.split_product.columns if method.split_product else 0}:
                if new("weight only", precision, _parts(packed), cut, bias is not None):
                    kernels.weight_only(packed, n, k, bias, cut, device)
        if method.split and method.precision[Role.PROTECTED] == "bf16" and not method.invariant:
            for cut in {0, method.split_product.columns if method.split_product else 0}:
                if new("few", n, k, cut, bias is not None):
                    kernels.few(method.master, bias, cut)
    for method in experts:
        if new("experts", method.sizes, method.form, *method.precision.values()):
            method.warm_up([1, *rows])
    for module in model.modules():
        forward = getattr(module, "_forward_method", None)
        if isinstance(forward, (FusedNorm, FusedActivation)):
            source, linear = forward.source, forward.linear
            fmt, k = linear.activation_format, linear.shape[1]
            if fmt and new(source, fmt, k, linear.split):
                kernels.quantise(source, k, fmt, device, protects=linear.split)
    torch.cuda.synchronize(device)
    return f"compiled {kernels.compiled() - before} kernels in {time.perf_counter() - begin:.1f} s"


def _parts(packed: PackedLinear) -> tuple[torch.Size, ...]:
    """What tells kinds of a linear apart: of a quantised checkpoint the parts of one (q, k, v) may be products of their
    own, in some blocks alone."""
    return tuple(tensor.shape for tensor in packed.tensors())
