"""FP8 attention: the emulation against float64, its segments, and the kernels around FlashAttention 3."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from mixquant_sglang.kernels.attention import (
    Segment,
    attend_emulated,
    blocks,
    merge,
    power_of_two,
    sample,
    sample_tokens,
    segments,
    to_e4m3,
)
from tests.kernels.test_triton_compiles import PREPARE
from tests.support.low_attention import KINDS, exact, operands
from tests.support.processes import ROOT


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# -- segments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "new", "most"), [(0, 5, 8), (3, 5, 8), (4, 5, 8), (100, 7, 8), (15, 1, 8), (999, 8, 8), (0, 1, 1)]
)
def test_segments_cover_all_keys_and_none_is_too_long(prefix: int, new: int, most: int) -> None:
    found = segments(prefix, new, most)
    assert found[0].start == 0 and found[-1].stop == prefix + new
    assert all(a.stop == b.start for a, b in pairwise(found))
    assert all(0 < part.keys <= most for part in found) and len(found) == -(-(prefix + new) // most)
    assert [part.causal for part in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].keys >= new  # each query sees itself


def test_segments_are_of_about_one_size() -> None:
    assert segments(24576, 8192) == [Segment(i * 8192, (i + 1) * 8192, i == 3) for i in range(4)]
    assert [part.keys for part in segments(30000, 1024)] == [7756] * 4
    assert [part.keys for part in segments(8191, 2)] == [4096, 4097]
    assert [*blocks(20, 8)] == [(0, 8), (8, 16), (16, 20)]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_errors_against_float64(kind: str) -> None:
    """Of keys with a bias, of keys with large channels, and of queries that look for one key far away."""
    q, k, v = operands(kind, 96, 1200)
    want = exact(q, k, v)
    got = attend_emulated(q, k, v, scaling=0.125, segment=256)
    assert got.dtype is torch.bfloat16 and got.shape == q.shape
    assert error(got, want) < {"normal": 0.06, "mean": 0.06, "outlier": 0.11, "needle": 0.05}[kind]
    assert error(got, want) > 0.003  # it is not BF16


def test_a_mean_of_other_keys_would_not_do() -> None:
    """What keys have in common is taken from the sample: where that has nothing of it, E4M3 has the bias to hold."""
    q, k, v = operands("mean", 32, 600)
    late = torch.cat([k[:300] - k.float().mean(0).bfloat16(), k[300:]])
    far = error(attend_emulated(q, late, v, scaling=0.125, tokens=300), exact(q, late, v))
    assert far > 2 * error(attend_emulated(q, k, v, scaling=0.125, tokens=300), exact(q, k, v))


def test_segments_change_little() -> None:
    q, k, v = operands("normal", 64, 900)
    once = attend_emulated(q, k, v, scaling=0.125, segment=1024)
    for segment in (64, 100, 300):
        assert error(attend_emulated(q, k, v, scaling=0.125, segment=segment), once) < 0.04


def test_small_and_large_values_keep_their_precision() -> None:
    """Powers of two of the sample: E4M3 alone would flush values below 2^-9, and saturate above 448."""
    q, k, v = operands("normal", 64, 500)
    want = error(attend_emulated(q, k, v, scaling=0.125), exact(q, k, v))
    for factor in (2.0**-20, 2.0**12):
        scaled = (v.float() * factor).bfloat16()
        assert error(attend_emulated(q, k, scaled, scaling=0.125), exact(q, k, scaled)) == pytest.approx(want, rel=0.01)


def test_the_sample_is_of_the_first_tokens_alone() -> None:
    _, k, v = operands("mean", 16, 400)
    known = sample(k[:100], v[:100])
    assert torch.allclose(known.mean, k[:100].float().mean(0))
    low = [to_e4m3((x.float() - known.mean) / known.scales[0][:, None]) for x in (k[:200], k)]
    assert torch.equal(low[0].float(), low[1][:200].float())  # more tokens change nothing of those before
    assert sample_tokens(8192) == 1024 and sample_tokens(300) == 300


def test_power_of_two_and_e4m3() -> None:
    x = torch.tensor([1.0, 1.0001, 0.75, 0.0, 3e38])
    assert power_of_two(x).tolist() == [1.0, 2.0, 1.0, 2.0**-100, 2.0**100]
    low = to_e4m3(torch.tensor([1000.0, -1000.0, torch.nan, 0.3])).float()
    assert low[:2].tolist() == [448.0, -448.0] and low[2].isnan() and low[3] == 0.3125


def test_parts_merge_to_the_whole() -> None:
    q, k, v = operands("normal", 20, 90)
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, 1)) * 0.125
    parts = []
    for keys in (slice(0, 30), slice(30, 90)):
        out = logits[..., keys].softmax(-1) @ v.double().repeat_interleave(2, 1)[keys].transpose(0, 1)
        parts.append((out.transpose(0, 1), logits[..., keys].logsumexp(-1)))
    whole = (logits.softmax(-1) @ v.double().repeat_interleave(2, 1).transpose(0, 1)).transpose(0, 1)
    assert error(merge(parts), whole) < 1e-6


# -- the kernels around FlashAttention 3 -------------------------------------------------------------------------------

INTERPRETED = """
from mixquant_sglang.kernels import attention as reference
from mixquant_sglang.kernels.triton import attention
from mixquant_sglang.layers.gathered_attention import Heads
from mixquant_sglang.layers.low_scratch import LowScratch
from tests.support.low_attention import KINDS, attend_low, exact, operands

for count, heads, size, tokens in ((300, 2, 64, 256), (70, 1, 128, 1024), (513, 4, 32, 100)):
    k = (torch.randn(700, heads, size) * 3 + torch.randn(heads, size) * 8).bfloat16()
    v = (torch.randn(700, heads, size) * 0.03).bfloat16()
    v[:, 0] = 0
    slots = torch.randperm(700)[:count].int()
    low = [torch.empty(count, heads, size, dtype=torch.float8_e4m3fn) for _ in range(2)]
    scales = attention.quantize_cache(k, v, slots, tokens, *low)
    k, v = k[slots.long()], v[slots.long()]
    known = reference.sample(k[:tokens], v[:tokens])
    same(scales, known.scales)
    same(low[1], reference.to_e4m3(v.float() / scales[1][:, None]))
    other = low[0].float() != reference.to_e4m3((k.float() - known.mean) / scales[0][:, None]).float()
    assert other.float().mean() < 1e-3  # sums of the mean in another order

q = (torch.randn(5, 100) * 300).bfloat16()
q[0, 0] = float("nan")
low = torch.empty(5, 100, dtype=torch.float8_e4m3fn)
attention.quantize_queries(q, low)
same(low, reference.to_e4m3(q))

parts, sums = torch.randn(4, 50, 3, 32).bfloat16(), torch.randn(4, 3, 50) * 5
for count in (1, 2, 3, 4):
    out, out_sums = torch.empty(40, 3, 32).bfloat16(), torch.zeros(3, 50)
    attention.merge(parts, sums, count, out, out_sums)
    want = reference.merge([(parts[i, :40], sums[i, :, :40]) for i in range(count)])
    assert ((out.float() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()
    assert torch.allclose(out_sums[:, :40], sums[:count, :, :40].logsumexp(0), atol=1e-5)
    assert (out_sums[:, 40:] == 0).all()

# the whole of it, with FlashAttention's arithmetic in float64: of more segments than there is room for, of several
# blocks of queries, of one segment
for prefix, new, segment in ((0, 60, 64), (400, 50, 64), (100, 90, 40), (0, 40, 40)):
    total = prefix + new
    q, k, v = operands("mean", new, total)
    slots = torch.randperm(total + 9)[:total]
    cache = [torch.full((total + 9, 2, 64), float("nan")).bfloat16() for _ in range(2)]
    for pages, rows in zip(cache, (k, v)):
        pages[slots] = rows
    scratch = LowScratch.of(Heads(4, 2, 64), total, 90, torch.device("cpu"))
    out = torch.empty_like(q)
    options = {"scaling": 0.125, "sample": 80, "segment": segment}
    scratch.attend(attend_low, q, tuple(cache), slots.int(), out, **options)
    want = reference.attend_emulated(q, k, v, scaling=0.125, tokens=80, segment=segment)
    error = (out.double() - want.double()).norm() / want.double().norm()
    far = (out.double() - exact(q, k, v)).norm() / exact(q, k, v).norm()
    assert error < 0.05 and far < 0.06, (prefix, new, error, far)  # weights are exact in the one, E4M3 in the other
"""


@pytest.mark.once
@pytest.mark.slow
def test_interpreted_kernels_give_the_numbers_of_torch() -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n" + PREPARE + INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_what_the_kernels_refuse() -> None:
    from mixquant_sglang.kernels.triton import attention

    k = torch.zeros(8, 2, 64, dtype=torch.bfloat16)
    low, slots = torch.zeros(4, 2, 64, dtype=torch.float8_e4m3fn), torch.zeros(4, dtype=torch.int32)
    parts, sums = torch.zeros(2, 8, 2, 64, dtype=torch.bfloat16), torch.zeros(2, 2, 8)
    for call in (
        lambda: attention.quantize_cache(k[..., :48].contiguous(), k, slots, 4, low, low),
        lambda: attention.quantize_cache(k.float(), k, slots, 4, low, low),
        lambda: attention.quantize_cache(k, k, slots.long(), 4, low, low),
        lambda: attention.quantize_cache(k, k, slots, 4, low[:3], low),
        lambda: attention.quantize_queries(k.flatten(1).t(), low.flatten(1)),
        lambda: attention.merge(parts, sums, 3, parts[0], sums[0]),
        lambda: attention.merge(parts, sums.half(), 2, parts[0], sums[0]),
    ):
        with pytest.raises(ValueError, match=r"must|cannot"):
            call()


# -- FlashAttention 3 itself -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(32, 8, 128), (4, 1, 128), (16, 2, 256), (8, 2, 64)])
def test_on_the_gpu_errors_are_those_of_the_emulation(kind: str, heads: tuple[int, int, int]) -> None:
    """24576 tokens: in one call FlashAttention 3 would be 7% and more off."""
    from mixquant_sglang.layers.gathered_attention import Heads
    from mixquant_sglang.layers.low_scratch import LowScratch
    from mixquant_sglang.versions.attention import flash_attention_3

    new, total = 2048, 24576
    q, k, v = operands(kind, new, total, heads, "cuda")
    scratch, slots = (
        LowScratch.of(Heads(*heads), total, new, torch.device("cuda")),
        torch.randperm(total, device="cuda"),
    )
    out, scaling = torch.empty_like(q), heads[2] ** -0.5
    cache = torch.empty_like(k), torch.empty_like(v)
    cache[0][slots], cache[1][slots] = k, v
    scratch.attend(flash_attention_3()[1], q, cache, slots.int(), out, scaling=scaling)
    rows = torch.arange(0, new, 64, device="cuda")
    want = exact(q, k, v, rows, scaling)
    emulated = error(attend_emulated(q, k, v, scaling=scaling)[rows], want)
    found = error(out[rows], want)
    print(kind, heads, f"{100 * found:.2f}% (emulated {100 * emulated:.2f}%)")
    assert found < emulated + 0.03


@pytest.mark.gpu
def test_on_the_gpu_nothing_is_compiled_after_the_check_at_start() -> None:
    from mixquant_sglang.host.low_attention import _compare
    from mixquant_sglang.kernels.triton.warm_up import compiled
    from mixquant_sglang.layers.gathered_attention import Heads
    from mixquant_sglang.layers.low_scratch import LowScratch
    from mixquant_sglang.versions.attention import flash_attention_3

    device, heads = torch.device("cuda"), (8, 2, 128)
    scratch = LowScratch.of(Heads(*heads), 50000, 2048, device)
    assert _compare(scratch, 1024, device) == ""
    known = compiled()
    assert known > 3
    for new, total in ((1024, 8192), (1031, 9001), (2048, 30000), (4097, 49999)):
        q, k, v = operands("normal", new, total, heads, "cuda")
        slots = torch.randperm(total, device=device).int()
        scratch.attend(flash_attention_3()[1], q, (k, v), slots, torch.empty_like(q), scaling=0.1)
    assert compiled() == known


@pytest.mark.gpu
def test_on_the_gpu_a_rows_bits_do_not_depend_on_what_ran_before() -> None:
    """Of scratch that other requests have filled."""
    from mixquant_sglang.layers.gathered_attention import Heads
    from mixquant_sglang.layers.low_scratch import LowScratch
    from mixquant_sglang.versions.attention import flash_attention_3

    heads, whole = (32, 8, 128), flash_attention_3()[1]
    scratch = LowScratch.of(Heads(*heads), 40000, 8192, torch.device("cuda"))
    found = []
    for kind, new, total in (("normal", 1500, 20000), ("mean", 8192, 40000), ("normal", 1500, 20000)):
        q, k, v = operands(kind, new, total, heads, "cuda")
        slots, out = torch.arange(total, device="cuda").int(), torch.empty_like(q)
        scratch.attend(whole, q, (k, v), slots, out, scaling=128**-0.5)
        found.append(out)
    assert torch.equal(found[0], found[2])
