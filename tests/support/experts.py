"""Experts of a mixture in plain torch, one expert after the other: what kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixquant_sglang.formats import fp8
from mixquant_sglang.kernels.experts.base import Form, Masters, halves
from mixquant_sglang.kernels.packing import quantize_nvfp4

OAI = Form("swiglu_oai", interleaved=True, alpha=1.702, limit=7.0)


def masters(
    experts: int, i: int, h: int, *, bias: bool = False, device: str = "cpu", scale: float = 0.1, seed: int = 0
) -> Masters:
    random = torch.Generator().manual_seed(seed)
    w13 = torch.randn(experts, 2 * i, h, generator=random).mul_(scale).bfloat16()
    w2 = torch.randn(experts, h, i, generator=random).mul_(scale).bfloat16()
    biases = [torch.randn(experts, n, generator=random) if bias else None for n in (2 * i, h)]
    return Masters(w13.to(device), w2.to(device), *(None if b is None else b.to(device) for b in biases))


def routed(
    tokens: int, experts: int, h: int, k: int, *, device: str = "cpu", seed: int = 1
) -> tuple[torch.Tensor, ...]:
    """x bfloat16 [T, H], weights float32 [T, k] and ids int32 [T, k], each token's experts all different."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, h, generator=random).bfloat16()
    scores, ids = torch.rand(tokens, experts, generator=random).topk(k)
    return x.to(device), (scores / scores.sum(-1, keepdim=True)).to(device), ids.int().to(device)


def activated(gate_up: torch.Tensor, form: Form) -> torch.Tensor:
    halves = (gate_up[..., 0::2], gate_up[..., 1::2]) if form.interleaved else gate_up.chunk(2, dim=-1)
    gate, up = halves
    if form.activation == "silu":
        return F.silu(gate) * up
    if form.activation == "gelu":
        return F.gelu(gate) * up
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return gate * torch.sigmoid(gate * form.alpha) * (up + 1)


def reference(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, of: Masters, form: Form) -> torch.Tensor:
    """float64 [T, H], nothing rounded in between."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in sorted({*ids.flatten().tolist()} - {-1}):
        token, place = (ids == e).nonzero(as_tuple=True)
        weight = weights[token, place, None].double()
        gate_up = x[token].double() @ of.w13[e].double().t()
        gate_up = gate_up if of.bias13 is None else gate_up + of.bias13[e].double()
        result = activated(gate_up * weight if form.weighted_input else gate_up, form) @ of.w2[e].double().t()
        result = result if of.bias2 is None else result + of.bias2[e].double()
        out.index_add_(0, token, result if form.weighted_input else result * weight)
    return out * form.scaling


def held(of: Masters, precision: str, form: Form) -> Masters:
    """``dequantised`` as experts are packed: a tensor scale of NVFP4 is that of w13 with gate before up."""
    made = dequantised(of, precision)
    if precision == "fp8":
        return made
    w13 = dequantised(of._replace(w13=halves(of.w13, form)), precision).w13
    if form.interleaved:
        w13 = torch.stack(w13.chunk(2, dim=1), dim=2).flatten(1, 2)
    return made._replace(w13=w13)


def dequantised(of: Masters, precision: str) -> Masters:
    """The numbers that low copies of ``of`` hold, as float32."""

    def each(weights: torch.Tensor) -> torch.Tensor:
        if precision == "fp8":
            return torch.stack([fp8.quantize(w).dequantize(torch.float32) for w in weights])
        return torch.stack([quantize_nvfp4(w, scales="search").dequantize(torch.float32) for w in weights])

    return of._replace(w13=each(of.w13), w2=each(of.w2))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, of the worst row; a row of zeros must be zeros."""
    difference = (got.double() - want.double()).norm(dim=-1)
    size = want.double().norm(dim=-1)
    assert bool((difference[size == 0] == 0).all())
    return float((difference / size.clamp(min=1e-30))[size > 0].max()) if bool((size > 0).any()) else 0.0
