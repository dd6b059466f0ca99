"""Norms of heads, RoPE and the write of the cache in one kernel: the arithmetic that SGLang's machine code has, to the
bit, in Triton's interpreter; and SGLang's own kernels, on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from mixquant_sglang.kernels.triton import norm_rope
from tests.kernels.test_triton_compiles import PREPARE

INTERPRETED = """
import numpy as np
from mixquant_sglang.kernels.triton.norm_rope import TILES, Tile, norm_rope_write


def fma(x, y, z):
    # 48 bits of the product and its sum with z in float64: one rounding more, which no number here is hit by
    return (x.double() * y.double() + z.double()).float()


def create_fma(self, x, y, z):
    got = fma(*(torch.from_numpy(np.ascontiguousarray(t.data)) for t in (x, y, z)))
    return interpreter.TensorHandle(got.numpy(), x.dtype.scalar)


interpreter.InterpreterBuilder.create_fma = create_fma


def normed(x, weight, eps):
    # [T, H, size]: each of 32 lanes sums its elements in their order, the lanes are summed by halves
    size = x.shape[-1]
    lanes = x.float().reshape(*x.shape[:2], 32, size // 32)
    total = torch.zeros(lanes.shape[:3])
    for i in range(size // 32):
        total = fma(lanes[..., i], lanes[..., i], total)
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    # the interpreter's rsqrt
    r = torch.from_numpy((1 / np.sqrt((total * (1 / size) + np.float32(eps)).numpy())).astype(np.float32))
    return (x.float() * r * weight.float()).bfloat16()


def turned(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([fma(a, cos, -(b * sin)), fma(b, cos, a * sin)], -1).bfloat16()


def check(rows, queries, heads, size, tile, norm, split, ints):
    sizes = [queries * size, heads * size, heads * size]
    qkv = torch.randn(rows, sum(sizes)) * torch.exp2(torch.linspace(-9, 9, rows))[:, None]
    qkv[2::5] = 0
    qkv = qkv.bfloat16()
    angles = torch.rand(50, size // 2) * 7
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
    positions = torch.randint(0, 50, (rows + 2,)).to(ints)  # the buffers of a graph are longer
    slots = (torch.randperm(rows + 9)[: rows + 2] + 1).to(ints)
    if rows > 3:
        slots[3] = 0  # padding
    weights = ((1 + torch.randn(size)).bfloat16(), torch.randn(size).bfloat16(), 1e-6) if norm else None
    keys, values = (torch.full((rows + 12, heads * size), 5.0).bfloat16() for _ in range(2))
    if split:
        q, rest = qkv[:, : sizes[0]].contiguous(), qkv[:, sizes[0] :].contiguous()
        k, v = torch.split(rest, sizes[1:], 1)
    else:
        q, k, v = torch.split(qkv.clone(), sizes, 1)
    want = []
    for x, count, weight in ((q, queries, weights and weights[0]), (k, heads, weights and weights[1])):
        x = x.reshape(rows, count, size)
        x = normed(x, weight, 1e-6) if norm else x
        want.append(turned(x, *cos_sin[positions[:rows].long()].chunk(2, -1)).flatten(1))
    before = v.clone()
    out = norm_rope_write(q, k, v, weights, cos_sin, positions, slots, keys, values, size, tile)
    same(out, want[0])
    assert out.is_contiguous() and (out is q) == q.is_contiguous()
    same(k, want[1])
    same(v, before)
    used = slots[:rows].long()
    for cache, rows_of in ((keys, k), (values, v)):
        expected = torch.full_like(cache, 5.0)
        expected[used] = rows_of
        expected[0] = 5.0
        same(cache, expected)


for size in (64, 128, 256):
    for norm in (True, False):
        check(7, 5, 2, size, Tile(4, 1), norm, split=norm, ints=torch.int64)
check(0, 4, 2, 64, TILES[0], True, split=False, ints=torch.int64)
check(1, 1, 1, 128, TILES[0], True, split=False, ints=torch.int32)
for tile in TILES:
    check(9, 20, 4, 128, tile, True, split=False, ints=torch.int64)
"""


@pytest.mark.once
@pytest.mark.slow
def test_interpreted() -> None:
    """In a process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined."""
    run = subprocess.run(
        [sys.executable, "-c", PREPARE + INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_refusals() -> None:
    size, rows = 64, 3
    weight = torch.ones(size, dtype=torch.bfloat16)
    given = {
        "q": torch.zeros(rows, 2 * size, dtype=torch.bfloat16),
        "k": torch.zeros(rows, size, dtype=torch.bfloat16),
        "v": torch.zeros(rows, size, dtype=torch.bfloat16),
        "weights": (weight, weight, 1e-6),
        "cos_sin": torch.zeros(9, size),
        "positions": torch.zeros(rows, dtype=torch.int64),
        "slots": torch.zeros(rows, dtype=torch.int64),
        "keys": torch.zeros(5, size, dtype=torch.bfloat16),
        "values": torch.zeros(5, size, dtype=torch.bfloat16),
        "size": size,
    }
    for changes in (
        {"size": 96},
        {"q": given["q"].float()},
        {"q": given["q"][:, :96]},
        {"q": given["q"].t().contiguous().t()},
        {"k": given["k"][:2]},
        {"v": torch.zeros(rows, 2 * size, dtype=torch.bfloat16)},
        {"keys": torch.zeros(5, 2 * size, dtype=torch.bfloat16)},
        {"cos_sin": torch.zeros(9, size).bfloat16()},
        {"cos_sin": torch.zeros(9, size // 2)},
        {"positions": torch.zeros(rows - 1, dtype=torch.int64)},
        {"slots": torch.zeros(rows)},
        {"weights": (weight.float(), weight, 1e-6)},
        {"weights": (weight, weight[:32], 1e-6)},
    ):
        with pytest.raises(ValueError, match="must"):
            norm_rope.norm_rope_write(**given | changes)
