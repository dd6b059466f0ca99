"""Experts of a mixture in plain torch, one pair of a token and an expert at a time: what kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixquant_sglang.kernels.experts.base import Form, Masters

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


def reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    of: Masters,
    form: Form,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """[T, H] in ``dtype``, nothing rounded in between."""
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if e < 0:
                continue
            gate_up = of.w13[e].to(dtype) @ x[t].to(dtype)
            gate_up = gate_up if of.bias13 is None else gate_up + of.bias13[e].to(dtype)
            weight = weights[t, j].to(dtype)
            result = of.w2[e].to(dtype) @ activated(gate_up * weight if form.weighted_input else gate_up, form)
            result = result if of.bias2 is None else result + of.bias2[e].to(dtype)
            out[t] += result if form.weighted_input else result * weight
    return out * form.scaling


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, of the worst row; a row of zeros must be zeros."""
    difference = (got.double() - want.double()).norm(dim=-1)
    size = want.double().norm(dim=-1)
    assert bool((difference[size == 0] == 0).all())
    return float((difference / size.clamp(min=1e-30))[size > 0].max()) if bool((size > 0).any()) else 0.0
