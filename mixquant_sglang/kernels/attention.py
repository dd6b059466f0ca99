"""Attention in FP8 (E4M3), in plain torch, and the segments of keys that every form of it walks.

What FlashAttention 3 does with operands of E4M3, for one request: ``o = softmax(q K'^T) V``, with q, K' and V in
E4M3, the weights in E4M3 times 2^8 under the largest logit of their row, sums in FP32.  K' is K minus one vector for
each head of keys: softmax does not see it, and E4M3 would lose in it what tells keys apart.  That vector, and the
powers of two that K' and V are divided by, come of the first tokens of the sequence (``sample_tokens``), so they do not
depend on chunks, on what was cached, or on neighbours.

The tensor cores of SM90 add up what they multiply in FP8 with 14 bits or so, cut off, not rounded: a sum of products
shrinks with its length, by 10% at 32768 keys and 28% at 131072 (measured).  So keys come in segments of at most
``limits.FP8_SEGMENT``, whose results are merged by log-sum-exp in FP32.  The emulation here has exact sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mixquant_sglang.kernels.limits import FP8_SAMPLE, FP8_SEGMENT

E4M3_MAX = 448.0
LARGEST_OF_SAMPLE = 56.0  # what the sample's largest magnitude is at most in E4M3: later tokens may be 8 times as large
_P_SCALE = 256.0  # of the weights
_PAIRS = 1 << 21  # of a query and a key, for each head, whose logits are in memory at once


@dataclass(frozen=True)
class Segment:
    """Keys ``start`` to ``stop`` of a request; ``causal``: the last query sees the last of them, each one before that
    one key less.  Without it all queries see all of them."""

    start: int
    stop: int
    causal: bool

    @property
    def keys(self) -> int:
        return self.stop - self.start


def sample_tokens(attention_from: int) -> int:
    """How many tokens at the start of a sequence its mean and scales are taken from: every sequence that is long
    enough for this attention has them."""
    return min(FP8_SAMPLE, attention_from)


def segments(prefix: int, new: int, most: int = FP8_SEGMENT) -> list[Segment]:
    """As few as ``most`` keys in each allow, of about the same size, for ``new`` <= ``most`` queries behind ``prefix``
    keys; the last one has the queries' own keys."""
    total = prefix + new
    count = -(-total // most)
    last = max(new, -(-total // count))
    before = total - last
    starts = [before * i // max(count - 1, 1) for i in range(count)] if before else [0]
    return [Segment(a, b, False) for a, b in pairwise(starts)] + [Segment(before, total, True)]


def blocks(new: int, most: int = FP8_SEGMENT) -> Iterator[tuple[int, int]]:
    """``new`` queries in ranges of at most ``most``."""
    for start in range(0, new, most):
        yield start, min(start + most, new)


@dataclass(frozen=True)
class Sample:
    """Of the first tokens of a sequence: ``mean`` [heads, size] FP32 of its keys; ``scales`` [2, heads] FP32, powers of
    two, of K minus the mean and of V."""

    mean: torch.Tensor
    scales: torch.Tensor


def sample(keys: torch.Tensor, values: torch.Tensor) -> Sample:
    """Of ``keys`` and ``values`` [tokens, heads, size]."""
    mean = keys.float().mean(0)
    largest = torch.stack([(keys.float() - mean).abs().amax((0, 2)), values.float().abs().amax((0, 2))])
    return Sample(mean, power_of_two(largest / LARGEST_OF_SAMPLE))


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The next power of two from x >= 0 on, FP32, within 2^-100 and 2^100; NaN gives one of them."""
    bits = x.clamp(2.0**-100, 2.0**100).view(torch.int32)
    return ((bits + 0x7FFFFF) >> 23 << 23).view(torch.float32)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """To nearest even, saturating; NaN stays."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """FP32 [rows, heads, size] of ``parts``, each results [rows, heads, size] and the logarithms of their sums
    [heads, rows]."""
    weights = torch.stack([lse for _, lse in parts]).float().softmax(0).transpose(1, 2)
    return torch.stack([part.float() * weights[i, ..., None] for i, (part, _) in enumerate(parts)]).sum(0)


def attend_emulated(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    tokens: int = FP8_SAMPLE,
    segment: int = FP8_SEGMENT,
) -> torch.Tensor:
    """``q`` [new, heads, size], ``keys`` and ``values`` [prefix + new, key heads, size], all BF16 -> BF16 like q.

    ``tokens``: of the sample; ``segment``: keys in a segment, at most."""
    known = sample(keys[:tokens], values[:tokens])
    k_scale, v_scale = known.scales[:, :, None]
    low_k = to_e4m3((keys.float() - known.mean) / k_scale).float() * (k_scale * scaling)
    low_v = to_e4m3(values.float() / v_scale).float() * v_scale
    low_q = to_e4m3(q).float()
    out, prefix = torch.empty_like(q), len(keys) - len(q)
    for start, stop in blocks(len(q), segment):
        parts = []
        for part in segments(prefix + start, stop - start, segment):
            k, v = low_k[part.start : part.stop], low_v[part.start : part.stop]
            parts.append(_attend_segment(low_q[start:stop], k, v, part.causal))
        out[start:stop] = merge(parts).to(out.dtype)
    return out


def _attend_segment(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP32 arithmetic; the result as FlashAttention gives it, rounded to BF16, and log-sum-exp [heads, rows]."""
    rows, heads, size = q.shape
    shared = heads // keys.shape[1]
    k = keys.permute(1, 2, 0)[:, None]  # key heads, 1, size, keys
    v = values.transpose(0, 1)[:, None]
    out, sums = q.new_empty(rows, heads, size), q.new_empty(heads, rows)
    step = max(1, _PAIRS // len(keys))
    for start in range(0, rows, step):
        part = q[start : start + step]
        logits = part.transpose(0, 1).reshape(-1, shared, len(part), size) @ k
        if causal:
            seen = len(keys) - rows + start + torch.arange(len(part), device=q.device)
            unseen = torch.arange(len(keys), device=q.device) > seen[:, None]
            logits.masked_fill_(unseen, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        weights = (logits - largest).exp_()
        total = weights.sum(-1, keepdim=True)
        low = (weights * _P_SCALE).to(torch.float8_e4m3fn).float() / _P_SCALE
        out[start : start + step] = ((low @ v) / total).flatten(0, 1).transpose(0, 1)
        sums[:, start : start + step] = (largest + total.log())[..., 0].flatten(0, 1)
    return out.bfloat16(), sums
