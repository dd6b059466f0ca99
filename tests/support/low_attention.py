"""Operands of attention whose structure is hard for E4M3, and attention in float64."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("normal", "mean", "outlier", "needle")


def operands(
    kind: str, new: int, total: int, heads: tuple[int, int, int] = (4, 2, 64), device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [new, heads, size], k and v [total, key heads, size], BF16: ``mean``: all keys have a large vector in common;
    ``outlier``: channels 20 times as large; ``needle``: queries look for one key a third of the way in."""
    seed = torch.Generator(device).manual_seed(3)

    def random(rows: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, heads[2], generator=seed, device=device)

    q, k, v = random(new, heads[0]), random(total, heads[1]), random(total, heads[1])
    channels = torch.arange(6, device=device) * (heads[2] // 6)
    if kind == "mean":
        k[:, :, channels] += 20
    elif kind == "outlier":
        k[:, :, channels] *= 20
        q[:, :, channels] *= 0.2
    elif kind == "needle":
        aim = k[total // 3].repeat_interleave(heads[0] // heads[1], 0)
        q = 0.5 * q + aim * (13 * heads[2] ** 0.5 / aim.square().sum(-1, keepdim=True))
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor | None = None, scaling: float | None = None
) -> torch.Tensor:
    """float64 [rows, heads, size] of rows of ``q``, all by default; the last query sees all keys."""
    rows = torch.arange(len(q), device=q.device) if rows is None else rows
    shared = q.shape[1] // k.shape[1]
    scaling = q.shape[2] ** -0.5 if scaling is None else scaling
    unseen = torch.arange(len(k), device=q.device) > len(k) - len(q) + rows[:, None]
    parts = []
    for head in range(q.shape[1]):
        logits = q[rows, head].double() @ k[:, head // shared].double().T * scaling
        parts.append(logits.masked_fill_(unseen, -torch.inf).softmax(-1) @ v[:, head // shared].double())
    return torch.stack(parts, 1)


def attend_low(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    q_descale: torch.Tensor,
    k_descale: torch.Tensor,
    v_descale: torch.Tensor,
    return_softmax_lse: bool,
    out: torch.Tensor,
) -> tuple[Any, ...]:
    """``flash_attn_varlen_func`` of one request with operands of E4M3, in float64: results and log-sum-exp."""
    assert return_softmax_lse and {t.dtype for t in (q, k, v)} == {torch.float8_e4m3fn}
    assert cu_seqlens_q.tolist() == [0, len(q)] and cu_seqlens_k.tolist() == [0, len(k)] and len(k) == len(v)
    assert (max_seqlen_q, max_seqlen_k) == (len(q), len(k)) and out.shape == q.shape
    shared = q.shape[1] // k.shape[1]
    scaled = [x.double() * scale[0, :, None].double() for x, scale in ((k, k_descale), (v, v_descale))]
    keys, values = (x.repeat_interleave(shared, 1).transpose(0, 1) for x in scaled)
    logits = (q.double() * q_descale[0, 0].double()).transpose(0, 1) @ keys.mT * softmax_scale
    if causal:
        logits.masked_fill_(~torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)), -torch.inf)
    out.copy_((logits.softmax(-1) @ values).transpose(0, 1))
    return out, logits.logsumexp(-1).float()
