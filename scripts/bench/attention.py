#!/usr/bin/env python3
"""Prefill attention of new rows behind a prefix with FlashAttention 3: BF16 from pages of one token, BF16 of gathered
keys and values, and FP8 in segments, as the server runs it (all the kernels around it included).

ms: medians over calls, arms in turn.  TFLOP/s: of the multiplications that a causal mask leaves, 4 * size for each pair
of a query and a key and head.  Errors: relative RMS of sampled rows against float64, for keys and values of four kinds:
normal; ``mean``, a bias of 8 in six channels of K, and one of 1 in V; ``outlier``, those channels 20 times as large;
``needle``, queries that put most of their weight on one key far away.  ``shrink``: how much too short the results are,
1 - <got, exact> / <exact, exact>, of sums that are cut off.

--variants: one call of FP8 over all keys, segments of other lengths, merging by sgl_kernel's merge_state_v2, the
kernels around the calls by themselves.  Prints tables; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mixquant_sglang.kernels.attention import segments
from mixquant_sglang.layers.gathered_attention import Heads
from mixquant_sglang.layers.low_scratch import LowScratch
from mixquant_sglang.versions.attention import flash_attention_3
from scripts.bench.servers import machine

KINDS = ("normal", "mean", "outlier", "needle")
SAMPLED = 64  # rows whose exact results are computed
Call = Callable[[], Any]


class Cell:
    """``new`` rows behind ``prefix`` tokens: data, and the arms over it."""

    def __init__(self, heads: Heads, new: int, prefix: int) -> None:
        self.heads, self.new, self.total = heads, new, new + prefix
        device = torch.device("cuda")
        self.paged, self.whole = flash_attention_3()
        shape = (self.total, 1, heads.keys, heads.size)
        caches = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2)]
        self.slots = torch.randperm(self.total, device=device).int()
        self.scratch = LowScratch.of(heads, self.total, new, device)
        self.arguments = {
            "q": torch.randn(new, heads.queries, heads.size, dtype=torch.bfloat16, device=device),
            "k_cache": caches[0],
            "v_cache": caches[1],
            "page_table": self.slots[None],
            "cache_seqlens": self.scratch.starts(self.total)[1:],
            "cu_seqlens_q": self.scratch.starts(new),
            "cu_seqlens_k_new": self.scratch.starts(self.total),
            "max_seqlen_q": new,
            "softmax_scale": heads.size**-0.5,
            "causal": True,
            "num_splits": 0,
        }
        self.cache = caches[0].flatten(0, 1), caches[1].flatten(0, 1)
        self.gathered = torch.empty_like(self.cache[0]), torch.empty_like(self.cache[1])
        self.out = torch.empty_like(self.arguments["q"])

    def fill(self, kind: str) -> None:
        """With keys and values of ``kind``, and the queries for them."""
        torch.manual_seed(1)
        k, v, q = *self.cache, self.arguments["q"]
        for x in (k, v, q):
            x.normal_()
        channels = torch.arange(6, device="cuda") * (self.heads.size // 6)
        if kind == "mean":
            k[:, :, channels] += 8
            v += 1
        elif kind == "outlier":
            k[:, :, channels] *= 20
            q[:, :, channels] *= 0.2
        elif kind == "needle":
            token = self.slots[self.total // 3].long()
            direction = k[token].repeat_interleave(self.heads.queries // self.heads.keys, 0).float()
            q.copy_(q.float() * 0.5 + 1.3 * direction / direction.square().mean(-1, keepdim=True))

    # -- arms --------------------------------------------------------------------------------------------------------

    def from_pages(self) -> torch.Tensor:
        return self.paged(**self.arguments, ver=3)  # type: ignore[no-any-return]

    def gather(self) -> torch.Tensor:
        for cache, out in zip(self.cache, self.gathered, strict=True):
            torch.index_select(cache.flatten(1), 0, self.slots, out=out.flatten(1))
        return self.gathered[0]

    def contiguous(self) -> Any:
        self.gather()
        return self._call(self.arguments["q"], self.gathered, self.total, True)

    def low(self, segment: int = 8192) -> torch.Tensor:
        scaling = self.arguments["softmax_scale"]
        self.scratch.attend(
            *(self.whole, self.arguments["q"], self.cache, self.slots, self.out), scaling=scaling, segment=segment
        )
        return self.out

    def _call(
        self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], keys: int, causal: bool, **more: Any
    ) -> Any:
        lengths: dict[str, Any] = {
            "cu_seqlens_q": self.scratch.starts(len(q)),
            "cu_seqlens_k": self.scratch.starts(keys),
        }
        lengths |= {"max_seqlen_q": len(q), "max_seqlen_k": keys, "causal": causal}
        return self.whole(q, *cache, softmax_scale=self.arguments["softmax_scale"], **lengths, **more)

    # -- variants ------------------------------------------------------------------------------------------------------

    def quantized(self) -> tuple[torch.Tensor, dict[str, Any]]:
        from mixquant_sglang.kernels.triton.attention import quantize_cache, quantize_queries

        s = self.scratch
        scales = quantize_cache(*self.cache, self.slots, 1024, s.keys, s.values)
        low = s.queries[: self.new]
        quantize_queries(self.arguments["q"].flatten(1), low)
        descale = {"q_descale": s.ones, "k_descale": scales[:1], "v_descale": scales[1:]}
        return low.view_as(self.arguments["q"]), descale

    def one_call(self) -> Any:
        low, descale = self.quantized()
        return self._call(low, (self.scratch.keys, self.scratch.values), self.total, True, out=self.out, **descale)

    def calls_alone(self, segment: int = 8192) -> Call:
        """Nothing quantised, nothing merged."""
        low, descale = self.quantized()
        parts, s = segments(self.total - self.new, self.new, segment), self.scratch

        def run() -> torch.Tensor:
            for p in parts:
                cache = s.keys[p.start : p.stop], s.values[p.start : p.stop]
                more = {**descale, "return_softmax_lse": True, "out": s.parts[0, : self.new]}
                self._call(low, cache, p.keys, p.causal, **more)
            return self.out

        return run

    def in_pairs(self) -> Any:
        """Merged by sgl_kernel, two at a time."""
        from sgl_kernel import merge_state_v2

        low, descale = self.quantized()
        s, held = self.scratch, None
        for p in segments(self.total - self.new, self.new):
            cache = s.keys[p.start : p.stop], s.values[p.start : p.stop]
            out, lse, *_ = self._call(low, cache, p.keys, p.causal, return_softmax_lse=True, **descale)
            lse = lse.T.contiguous()
            held = (out, lse) if held is None else merge_state_v2(*held, out, lse)
        assert held is not None
        return held[0]

    def merges_alone(self) -> torch.Tensor:
        from mixquant_sglang.kernels.triton.attention import merge

        count, most = len(segments(self.total - self.new, self.new)), len(self.scratch.parts)
        for _ in range(-(-(count - 1) // (most - 1))):
            merge(self.scratch.parts, self.scratch.sums, min(most, count), self.out, self.scratch.sums[0])
        return self.out

    # -- what is measured ----------------------------------------------------------------------------------------------

    @property
    def flops(self) -> float:
        pairs = self.new * (self.total - self.new) + self.new * (self.new + 1) / 2
        return 4 * pairs * self.heads.queries * self.heads.size

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers, and float64 results [rows, heads, size]."""
        rows = torch.linspace(0, self.new - 1, SAMPLED, device="cuda").long()
        q = self.arguments["q"][rows].double()
        seen = self.total - self.new + rows[:, None] >= torch.arange(self.total, device="cuda")
        shared, parts = self.heads.queries // self.heads.keys, []
        for head in range(self.heads.keys):
            k, v = (cache[self.slots.long(), head].double() for cache in self.cache)
            logits = q[:, head * shared : (head + 1) * shared].transpose(0, 1) @ k.T * self.arguments["softmax_scale"]
            weights = logits.masked_fill_(~seen, -torch.inf).softmax(-1)
            parts.append((weights @ v).transpose(0, 1))
        return rows, torch.cat(parts, 1)

    def errors(self, arms: dict[str, Call]) -> dict[str, tuple[float, float]]:
        """By arm: relative RMS, and how much too short."""
        rows, exact = self.exact()
        found = {}
        for name, call in arms.items():
            got = call()[rows].double()
            error = float((got - exact).norm() / exact.norm())
            found[name] = error, 1 - float((got * exact).sum() / exact.square().sum())
        return found


def milliseconds(arms: dict[str, Call], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 2):
        for name, call in arms.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            call()
            ended.record()
            ended.synchronize()
            if i > 1:
                times[name].append(began.elapsed_time(ended))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs=3, type=int, default=[32, 8, 128], help="of queries, of keys; elements")
    parser.add_argument("--new", nargs="+", type=int, default=[8192, 4096, 2048, 1024], help="new rows")
    parser.add_argument("--keys", nargs="+", type=int, default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args()
    heads, rows = Heads(*args.heads), []
    for new in args.new:
        for total in args.keys:
            if total < new:
                continue
            cell = Cell(heads, new, total - new)
            arms: dict[str, Call] = {"pages": cell.from_pages, "contiguous": cell.contiguous, "fp8": cell.low}
            if args.variants:
                arms |= {"fp8 one call": cell.one_call, "fp8 16384": partial(cell.low, 16384)}
                arms |= {"fp8 4096": partial(cell.low, 4096), "fp8 in pairs": cell.in_pairs}
            parts: dict[str, Call] = {}
            if args.variants:
                parts = {"gather": cell.gather, "quantise": lambda cell=cell: cell.quantized()[0]}  # type: ignore[misc]
                parts |= {"fp8 calls": cell.calls_alone(), "merges": cell.merges_alone}
            ms = milliseconds(arms | parts, args.rounds)
            errors: dict[str, dict[str, tuple[float, float]]] = {}
            for kind in KINDS:
                cell.fill(kind)
                errors[kind] = cell.errors(arms)
            rows.append({"new": new, "keys": total, "ms": ms, "errors": errors})
            show(new, total, cell.flops, ms, errors)
            del cell, arms, parts
            torch.cuda.empty_cache()
    print(json.dumps({**machine(), "heads": args.heads, "cells": rows}))


def show(
    new: int, total: int, flops: float, ms: dict[str, float], errors: dict[str, dict[str, tuple[float, float]]]
) -> None:
    print(f"\n{new} new rows, {total} keys")
    print(f"{'arm':<14}{'ms':>9}{'TFLOP/s':>9}{'over pages':>12}{'over cont.':>12}", *(f"{k:>16}" for k in KINDS))
    for name, time in ms.items():
        line = f"{name:<14}{time:>9.3f}"
        if name in errors[KINDS[0]]:
            line += f"{flops / time / 1e9:>9.0f}{ms['pages'] / time:>11.2f}x{ms['contiguous'] / time:>11.2f}x "
            cells = [errors[kind][name] for kind in KINDS]
            line += " ".join(f"{100 * e:>6.2f}% ({100 * s:>5.2f}%)" for e, s in cells)
        print(line, flush=True)


def command() -> None:
    main()
