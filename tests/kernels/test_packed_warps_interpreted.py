"""The kernel of few rows over packed weights in Triton's interpreter: exact sums have the bits of ``formats/``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.kernels.test_triton_compiles import BF16_DOT, PREPARE

pytestmark = [pytest.mark.slow, pytest.mark.once]

COMMON = """
import numpy
from mixquant_sglang.kernels.triton import packed_rows, packed_tiles
from mixquant_sglang.kernels.triton.packed_tiles import Warps

LOCKS = torch.zeros(packed_tiles.LOCKS, dtype=torch.int32)
SHAPES = [(96, 64), (40, 48), (33, 16), (24, 1040)]
SIZES = [Warps(16, 2, 8), Warps(32, 1, 2)]
codes = torch.arange(256).to(torch.uint8)


def weight8(bits, scale):
    return packed_rows.Packed(bits.view(torch.float8_e4m3fn), scale, LOCKS)


def weight4(packed, block_scales, scale):
    return packed_rows.Packed(packed, scale, LOCKS, block_scales)


def unscaled(weight):
    if weight.block_scales is None:
        return weight.codes.double()
    return reference.NVFP4Tensor(weight.codes, weight.block_scales, weight.scale).unscaled(torch.float64)


def rounded(exact, weight, bias):
    # of sums that FP32 holds: scaled, with the bias, rounded once
    total = exact.float()
    assert (total.double() == exact).all()
    total = total * weight.scale
    return (total if bias is None else total + bias.float()).bfloat16()


def check(rows, weight, bias, sizes=SIZES):
    exact = rows.double() @ unscaled(weight).t()
    for tiles in sizes:
        for b in (None, bias):
            same(packed_rows.linear_rows(rows, weight, b, tiles=tiles), rounded(exact, weight, b))
"""

CODES = """
# one product in each sum: every code, every block scale, at every place of a piece and of what warps share
ones = torch.where(codes & 0x7F == 0x7F, 0, codes)
for (n, k), m in (((48, 256), 8), ((24, 1040), 16)):
    place = torch.arange(n)[:, None] * 3 + torch.arange(k)[None]
    scale = torch.rand(n) * 2.0 ** torch.randint(-30, 4, (n,))
    rows = torch.zeros(m, k)
    rows[torch.arange(m), torch.randint(0, k, (m,))] = torch.randn(m)
    rows, bias = rows.bfloat16(), torch.randn(n).bfloat16()
    check(rows, weight8(ones[place % 256], scale), bias)
    scales = (torch.arange(n)[:, None] * 5 + torch.arange(k // 16)[None]) % 127
    packed = codes[place[:, : k // 2] % 256]
    check(rows, weight4(packed, scales.to(torch.uint8).view(torch.float8_e4m3fn), scale[0]), bias)
"""

SUMS = """
# sums of small whole numbers, which FP32 holds in any order; odd sizes, other rows that are not numbers
digits = torch.arange(-8.0, 9).to(torch.float8_e4m3fn).view(torch.uint8)
for n, k in SHAPES[1:]:
    bits = digits[torch.randint(0, 17, (n, k))]
    whole = torch.tensor([0, 2, 4, 5, 6, 7, 8, 10, 12, 13, 14, 15])  # codes of 0, 1, 2, 3, 4, 6 and their negatives
    nibbles = whole[torch.randint(0, 12, (n, k))].to(torch.uint8)
    packed = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
    scales = torch.tensor([0.0, 0.5, 1, 2, 3])[torch.randint(0, 5, (n, k // 16))].to(torch.float8_e4m3fn)
    bias = torch.randn(n).bfloat16()
    for weight in (weight8(bits, torch.rand(n)), weight4(packed, scales, torch.tensor(0.37))):
        for m in (9, 33):
            rows = torch.randint(-8, 9, (m, k)).bfloat16()
            check(rows, weight, bias, SIZES if m == 9 else SIZES[:1])
        exact = rows.double() @ unscaled(weight).t()
        rows[1::2] = float("inf")
        rows[::8] = float("nan")
        fine = torch.arange(33) % 8 != 0
        fine[1::2] = False
        out = packed_rows.linear_rows(rows, weight, bias, tiles=SIZES[0])
        same(out[fine], rounded(exact, weight, bias)[fine])
        wider = torch.full((33, 2 * k), float("nan")).bfloat16()  # rows that lie apart
        wider[:, :k] = torch.randint(-8, 9, (33, k)).bfloat16()
        check(wider[:16, :k], weight, bias, SIZES[:1])
"""

PLACES = """
# in their places, some of the columns in another matrix; nothing else is written, unused rows are not read
for (n, k), (slots, used) in itertools.product(SHAPES[:2], [(1, 1), (5, 0), (16, 3), (16, 16), (40, 17)]):
    bits = torch.arange(-8.0, 9).to(torch.float8_e4m3fn).view(torch.uint8)[torch.randint(0, 17, (n, k))]
    weight, bias = weight8(bits, torch.rand(n)), torch.randn(n).bfloat16()
    rows = torch.randint(-8, 9, (slots, k)).bfloat16()
    rows[used:] = float("nan")
    index = torch.full((slots,), -1)
    index[:used] = torch.randperm(100)[:used]
    cut = 64 if n > 64 else n
    out, rest = torch.full((100, cut), 7.0).bfloat16(), torch.full((100, n - cut), 7.0).bfloat16()
    packed_rows.linear_rows(
        rows, weight, bias, out=out, index=index, rest=rest if n > cut else None, tiles=SIZES[0]
    )
    whole = torch.cat([out, rest], dim=1)
    same(whole[index[:used]], rounded(rows[:used].double() @ unscaled(weight).t(), weight, bias))
    whole[index[:used]] = 7
    assert (whole == 7).all()
"""

WALKED = """
# the slots of a graph, which programs go over up to 8, 16 or 32 at a time: their places and no others
digits = torch.arange(-8.0, 9).to(torch.float8_e4m3fn).view(torch.uint8)
for (n, k), fp4, walk in itertools.product(SHAPES[:2], (False, True), (8, 16, 32)):
    packed_rows.WALK = walk
    bias = torch.randn(n).bfloat16()
    if fp4:
        scales = torch.tensor([0.0, 0.5, 1, 2, 3])[torch.randint(0, 5, (n, k // 16))].to(torch.float8_e4m3fn)
        weight = weight4(torch.randint(0, 256, (n, k // 2)).to(torch.uint8), scales, torch.tensor(0.37))
    else:
        weight = weight8(digits[torch.randint(0, 17, (n, k))], torch.rand(n))
    for slots, used in ((70, 0), (70, 1), (72, walk), (72, walk + 1), (67, 67)) if walk == 8 else ((65, 65), (67, 33)):
        rows = torch.randint(-8, 9, (slots, k)).bfloat16()
        rows[used:] = float("nan")
        index = torch.full((slots,), -1)
        index[:used] = torch.randperm(100)[:used]
        cut = 64 if n > 64 else n
        out, rest = torch.full((100, cut), 7.0).bfloat16(), torch.full((100, n - cut), 7.0).bfloat16()
        packed_rows.linear_rows(
            rows, weight, bias, out=out, index=index, rest=rest if n > cut else None, tiles=SIZES[0]
        )
        whole = torch.cat([out, rest], dim=1)
        same(whole[index[:used]], rounded(rows[:used].double() @ unscaled(weight).t(), weight, bias))
        whole[index[:used]] = 7
        assert (whole == 7).all()
    if not fp4 or k % 32 == 0:  # tiles do not walk
        bucket, tiles, walked = packed_rows._chosen(weight, 70, True, packed_tiles.Tiles(16, 16, 1, 2, 4), rows.device)
        assert (bucket, type(tiles), walked) == (64, packed_tiles.Tiles, 0)
    assert packed_rows._chosen(weight, 64, True, SIZES[0], rows.device)[2] == 0
    assert packed_rows._chosen(weight, 70, False, SIZES[0], rows.device)[2] == 0
"""

ALONE = """
# 256 slots: each used one once, with the bits that its row has alone. Of what a warp multiplies at a time one product
# is not zero, and large ones cancel: the order in which FP32 adds them decides the bits
stored = []
store = interpreter.InterpreterBuilder.create_masked_store


def counted(self, pointers, value, mask, *rest):
    stored.append(pointers.data[mask.data].ravel())
    return store(self, pointers, value, mask, *rest)


interpreter.InterpreterBuilder.create_masked_store = counted
for fp4 in (False, True):
    n, k, slots, tiles = 72, 512 * (1 + fp4), 256, Warps(16, 1, 2)
    many = torch.arange(slots) % 25
    width = 64 * (1 + fp4)  # columns that a warp has at a time; of NVFP4 the even ones are added, then the odd ones
    steps = k // width
    values = torch.randn(25, steps, 1, 1 + fp4) * 4
    large = torch.rand(25, steps).argsort(dim=1)
    values[torch.arange(25), large[:, 0], 0, 0], values[torch.arange(25), large[:, 1], 0, 0] = 2.0**24, -(2.0**24)
    place = torch.randint(0, 64, (25, 1, 1, 1 + fp4)).expand(values.shape)
    rows = torch.zeros(25, steps, 64, 1 + fp4).scatter_(2, place, values)
    rows = rows.reshape(25, k).bfloat16()
    dense = torch.randn(n, width).bfloat16().repeat(1, steps)
    if fp4:
        q = reference.quantize(dense)
        weight = weight4(q.packed, q.block_scales, q.tensor_scale)
    else:
        q = fp8.quantize(dense)
        weight = weight8(q.data.view(torch.uint8), q.scales)
    alone = torch.cat([packed_rows.linear_rows(row, weight, tiles=tiles) for row in rows.split(1)])
    other = packed_rows.linear_rows(rows, weight, tiles=packed_tiles.Tiles(32, 128, 1, 2, 4))
    assert not torch.equal(other, alone)  # why tiles do not serve many
    for walk, used in itertools.product((8, 16, 32), (0, 1, 8, 9, 16, 17, 65)):
        packed_rows.WALK = walk
        given = rows[many]
        given[used:] = float("nan")
        index = torch.full((slots,), -1)
        index[:used] = torch.randperm(300)[:used]
        out, rest = torch.full((300, 64), 7.0).bfloat16(), torch.full((300, n - 64), 7.0).bfloat16()
        stored.clear()
        packed_rows.linear_rows(given, weight, out=out, index=index, rest=rest, tiles=tiles)
        places = numpy.concatenate(stored) if stored else numpy.zeros(0)
        assert len(places) == used * n == len(numpy.unique(places)), (fp4, walk, used)  # none twice
        whole = torch.cat([out, rest], dim=1)
        same(whole[index[:used]], alone[many[:used]])
        whole[index[:used]] = 7
        assert (whole == 7).all()
"""

BOUND = """
# any numbers: k - 1 additions in FP32, each off by 2^-24 of at most the sum of magnitudes; scale, bias and BF16 round
# by 2^-24, 2^-24 and 2^-8 of what they round
for (n, k), m in itertools.product(SHAPES, (1, 16)):
    dense, rows, bias = torch.randn(n, k).bfloat16(), torch.randn(m, k).bfloat16(), torch.randn(n).bfloat16()
    q8, q4 = fp8.quantize(dense), reference.quantize(dense)
    for weight in (weight8(q8.data.view(torch.uint8), q8.scales), weight4(q4.packed, q4.block_scales, q4.tensor_scale)):
        values = unscaled(weight)
        scale = weight.scale.double()
        total = (rows.double() @ values.t()) * scale
        off = (k - 1) * 2.0**-24 * (rows.double().abs() @ values.abs().t()) * scale
        for fitted in (None, SIZES[1]):
            out = packed_rows.linear_rows(rows, weight, bias, tiles=fitted)
            want = total + bias.double()
            rounding = (want.abs() + off) * (2.0**-8 + 2.0**-23) + total.abs() * 2.0**-23
            assert ((out.double() - want).abs() <= off + rounding).all(), (n, k, m, fitted)
"""


@pytest.mark.parametrize(
    "script",
    [CODES, SUMS, PLACES, WALKED, ALONE, BOUND],
    ids=["codes", "sums", "places", "walked", "alone", "bound"],
)
def test_interpreted_warps(script: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PREPARE + BF16_DOT + COMMON + script],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
