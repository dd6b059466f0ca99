"""Norms of heads, RoPE and the write of the cache: SGLang's three kernels, its two, and ours, of the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mixquant_sglang.kernels.triton.norm_rope import TILES, norm_rope_write

SIZE, QUERIES, KEYS = 128, 32, 8  # Qwen3-8B's heads
EPS, POSITIONS = 1e-6, 40960
Call = Callable[[], Any]


class Rows:
    """Of ``m`` random rows of a qkv_proj's result, and a cache that they fit in."""

    def __init__(self, m: int) -> None:
        sizes = [QUERIES * SIZE, KEYS * SIZE, KEYS * SIZE]
        random = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
        self.q, rest = random(m, sizes[0]), random(m, sum(sizes[1:]))  # q is apart there, as in recipe fp8
        self.k, self.v = torch.split(rest, sizes[1:], 1)
        self.weights = (random(SIZE), random(SIZE), EPS)
        angles = torch.rand(POSITIONS, SIZE // 2, device="cuda") * 7
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        self.positions = torch.randint(POSITIONS, (m,), device="cuda")
        self.slots = torch.randperm(m, device="cuda") + 1
        self.keys, self.values = (torch.zeros(m + 1, sizes[1], dtype=torch.bfloat16, device="cuda") for _ in "kv")

    def own(self, norm: bool, at_once: bool) -> None:
        """SGLang's kernels; ``at_once``: its RoPE writes the cache."""
        from sglang.kernels.ops.attention.rope import FusedSetKVBufferArg, apply_rope_with_cos_sin_cache_inplace
        from sglang.kernels.ops.kvcache.kvcache import store_cache
        from sglang.kernels.ops.layernorm.norm import fused_inplace_qknorm

        q, k = (x.view(len(x), -1, SIZE) for x in (self.q, self.k))
        if norm:
            fused_inplace_qknorm(q, k, *self.weights, head_dim=SIZE)
        arg = FusedSetKVBufferArg(self.v, self.keys, self.values, self.slots) if at_once else None
        apply_rope_with_cos_sin_cache_inplace(q, k, self.cos_sin, self.positions, is_neox=True, fused_args=arg)
        if not at_once:
            store_cache(self.k, self.v, self.keys, self.values, self.slots)

    def ours(self, norm: bool, tile: Any) -> None:
        weights = self.weights if norm else None
        cache = (self.keys, self.values)
        norm_rope_write(self.q, self.k, self.v, weights, self.cos_sin, self.positions, self.slots, *cache, SIZE, tile)

    def results(self) -> list[torch.Tensor]:
        return [self.q, self.k, self.keys, self.values]


def arms(norm: bool) -> dict[str, Callable[[Rows], None]]:
    what = "norm, rope, write" if norm else "rope, write"
    own = {f"sgl {what}": False, f"sgl {what} by rope": True}
    ours = {f"ours, {tile.heads} heads {tile.warps} warps": tile for tile in TILES}
    return {
        **{name: partial(Rows.own, norm=norm, at_once=at_once) for name, at_once in own.items()},
        **{name: partial(Rows.ours, norm=norm, tile=tile) for name, tile in ours.items()},
    }


def around(counts: list[int], microseconds: Callable[[int, Callable[[], Call]], float]) -> list[dict[str, Any]]:
    """``microseconds`` of a call, from its bytes and what makes it; raises ``SystemExit`` where an arm's bits are
    others than the first's."""
    found = []
    print(f"{'kernels':<28}{'M':>7}{'us':>9}{'GB/s':>7}   q read and written, k twice written, v read and written")
    for norm in (True, False):
        for m in counts:
            wanted: list[torch.Tensor] = []
            for name, call in arms(norm).items():
                torch.manual_seed(0)
                rows = Rows(m)
                call(rows)
                wanted = wanted or rows.results()
                if not all(map(torch.equal, rows.results(), wanted)):
                    raise SystemExit(f"{name}: other bits than SGLang's, of {m} rows")
                moved = 2 * m * SIZE * (2 * QUERIES + 5 * KEYS)

                def make(call: Callable[[Rows], None] = call, m: int = m) -> Call:
                    return partial(call, Rows(m))

                us = microseconds(moved, make)
                print(f"{name:<28}{m:>7}{us:>9.1f}{moved / us / 1e3:>7.0f}", flush=True)
                found.append({"kernels": name, "norm": norm, "m": m, "us": us, "bytes": moved})
    return found
