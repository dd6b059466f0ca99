"""Attention of one request's new rows in FP8 with FlashAttention 3, in memory that is set aside at start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mixquant_sglang.kernels.attention import blocks, segments
from mixquant_sglang.kernels.limits import FP8_PARTS, FP8_SAMPLE, FP8_SEGMENT
from mixquant_sglang.layers.gathered_attention import Heads


@dataclass
class LowScratch:
    """Of one layer at a time.  N tokens of keys and values, R queries, P parts of results before they are merged:
    ``keys``, ``values`` E4M3 [N, key heads, size]; ``queries`` E4M3 [R, heads * size]; ``parts`` BF16
    [P, R, heads, size]; ``sums`` FP32 [P, heads, R]; ``ones`` FP32 [1, key heads], the scale of queries."""

    heads: Heads
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    parts: torch.Tensor
    sums: torch.Tensor
    ones: torch.Tensor
    shared: bool = False
    _starts: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        heads: Heads,
        tokens: int,
        rows: int,
        device: torch.device,
        parts: int = FP8_PARTS,
        shared: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> LowScratch:
        """For requests of up to ``tokens`` tokens with their prefixes, of which up to ``rows`` are new.

        ``shared``: contiguous memory for keys and for values, which nothing else uses in the same layer of a pass."""
        rows = min(rows, FP8_SEGMENT)
        empty = partial(torch.empty, device=device)
        shape = tokens, heads.keys, heads.size
        if shared is None:
            keys, values = (empty(shape, dtype=torch.float8_e4m3fn) for _ in range(2))
        else:
            keys, values = (part.view(torch.float8_e4m3fn).view(-1, *shape[1:])[:tokens] for part in shared)
        queries = empty(rows, heads.queries * heads.size, dtype=torch.float8_e4m3fn)
        held = empty(parts, rows, heads.queries, heads.size, dtype=torch.bfloat16)
        sums = empty(parts, heads.queries, rows, dtype=torch.float32)
        ones = torch.ones(1, heads.keys, device=device)
        return cls(heads, keys, values, queries, held, sums, ones, shared is not None)

    @property
    def nbytes(self) -> int:
        """Without what is shared."""
        own = [self.queries, self.parts, self.sums] + ([] if self.shared else [self.keys, self.values])
        return sum(part.nbytes for part in own)

    def starts(self, length: int) -> torch.Tensor:
        """int32 [2]: 0 and ``length``."""
        known = self._starts.get(length)
        if known is None:
            if len(self._starts) > 256:
                self._starts.clear()
            known = self._starts[length] = torch.tensor([0, length], dtype=torch.int32, device=self.keys.device)
        return known

    def attend(
        self,
        whole: Callable[..., Any],
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        out: torch.Tensor,
        *,
        scaling: float | None,
        sample: int = FP8_SAMPLE,
        segment: int = FP8_SEGMENT,
    ) -> None:
        """``q`` and ``out``: BF16 [new, heads, size] of one request; ``cache``: of keys and of values, BF16
        [slots, key heads, size]; ``slots``: int32 [N], where the request's tokens lie, the new ones last.

        ``whole``: ``flash_attn_varlen_func``; ``sample``: tokens that the mean and the scales are taken from."""
        from mixquant_sglang.kernels.triton.attention import merge, quantize_cache, quantize_queries

        count, new = len(slots), len(q)
        keys, values = self.keys[:count], self.values[:count]
        scales = quantize_cache(*cache, slots, sample, keys, values)
        for start, stop in blocks(new, min(segment, self.parts.shape[1])):
            rows, target = stop - start, out[start:stop]
            low = self.queries[:rows]
            quantize_queries(q[start:stop].flatten(1), low)
            parts, held = segments(count - new + start, rows, segment), 0
            for part in parts:
                last = part is parts[-1]
                place = self.parts[held, :rows] if len(parts) > 1 else target
                found = whole(
                    low.view(rows, self.heads.queries, self.heads.size),
                    keys[part.start : part.stop],
                    values[part.start : part.stop],
                    cu_seqlens_q=self.starts(rows),
                    cu_seqlens_k=self.starts(part.keys),
                    max_seqlen_q=rows,
                    max_seqlen_k=part.keys,
                    softmax_scale=scaling,
                    causal=part.causal,
                    q_descale=self.ones,
                    k_descale=scales[:1],
                    v_descale=scales[1:],
                    return_softmax_lse=True,
                    out=place,
                )
                if found[0].data_ptr() != place.data_ptr():  # SGLang calls builds that know no ``out`` without it
                    place.copy_(found[0])
                if len(parts) == 1:
                    break
                self.sums[held, :, :rows] = found[1]
                held += 1
                if last or held == len(self.parts):
                    merge(self.parts, self.sums, held, target if last else self.parts[0, :rows], self.sums[0])
                    held = 1
