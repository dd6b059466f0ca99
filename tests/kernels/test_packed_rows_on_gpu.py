"""Linears of BF16 rows and packed weights on a GPU: against float64, in graphs, and what they must leave alone."""

import math

import pytest
import torch

from mixquant_sglang.formats import fp8, nvfp4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

SHAPES = [(6144, 4096), (4096, 12288), (1024, 3584), (96, 64), (40, 48), (3072, 1536), (1000, 1040)]


def packed(fmt: str, n: int, k: int):  # type: ignore[no-untyped-def]
    from mixquant_sglang.kernels.triton import packed_rows, packed_tiles

    torch.manual_seed(n + k)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    locks = torch.zeros(packed_tiles.LOCKS, dtype=torch.int32, device="cuda")
    if fmt == "w8a16":
        q = fp8.quantize(weight)
        return packed_rows.Packed(q.data, q.scales, locks), q.data.double() * q.scales[:, None].double()
    p = nvfp4.quantize(weight)
    values = p.unscaled(torch.float64) * p.tensor_scale.double()
    return packed_rows.Packed(p.packed, p.tensor_scale, locks, p.block_scales), values


@pytest.mark.parametrize("fmt", ["w8a16", "w4a16"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 7, 16, 17, 64, 100, 300])
def test_against_float64(fmt: str, n: int, k: int, m: int) -> None:
    from mixquant_sglang.kernels.triton.packed_rows import linear_rows

    weight, values = packed(fmt, n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    want = x.double() @ values.t()
    may = want.abs() * 2**-8 + 2**-20 * (x.double().abs() @ values.t().abs())
    for b in (None, bias):
        wanted = want if b is None else want + b.double()
        for _ in range(3):  # programs that share a tile arrive in another order
            out = linear_rows(x, weight, b)
            assert bool(((out.double() - wanted).abs() <= may + wanted.abs() * 2**-8).all())
            assert not weight.locks.any()


@pytest.mark.parametrize("fmt", ["w8a16", "w4a16"])
@pytest.mark.parametrize("m", [8, 16, 64, 300])
def test_a_row_does_not_depend_on_the_others_nor_on_the_call(fmt: str, m: int) -> None:
    from mixquant_sglang.kernels.triton.packed_rows import linear_rows

    weight, _ = packed(fmt, 4096, 4096)
    x = torch.randn(m, 4096, dtype=torch.bfloat16, device="cuda")
    out = linear_rows(x, weight)
    for _ in range(20):
        others = torch.randn_like(x) * 1e4
        others[::3] = x[::3]
        assert torch.equal(linear_rows(others, weight)[::3], out[::3])


@pytest.mark.parametrize("fmt", ["w8a16", "w4a16"])
@pytest.mark.parametrize(
    ("used", "slots"),
    [(1, 1), (0, 8), (3, 8), (16, 16), (0, 64), (1, 64), (16, 64), (40, 64), (1, 256), (100, 256), (256, 256)],
)
def test_in_a_graph_in_the_places_of_rows(fmt: str, used: int, slots: int) -> None:
    from mixquant_sglang.kernels.limits import PLACED
    from mixquant_sglang.kernels.triton import packed_rows, packed_tiles

    linear_rows = packed_rows.linear_rows
    weight, _ = packed(fmt, 6144, 4096)
    rows = torch.randn(slots, 4096, dtype=torch.bfloat16, device="cuda")
    index = torch.full((slots,), -1, device="cuda")
    first, rest = (torch.full((300, size), math.nan, dtype=torch.bfloat16, device="cuda") for size in (4096, 2048))
    linear_rows(rows, weight, out=first, index=index, rest=rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear_rows(rows, weight, out=first, index=index, rest=rest)
    chosen = torch.randperm(300)[:used].to("cuda")
    index[:used] = chosen
    graph.replay()
    together = torch.cat([first, rest], dim=1)
    # programs that go over the slots add as they do for a row alone, tiles as they do for as many rows as they take
    alone = slots > PLACED and packed_rows.WALK > 0 and packed_tiles.STRAIGHT
    want = torch.cat([linear_rows(part, weight) for part in rows.split(1 if alone else PLACED)])[:used]
    assert torch.equal(together[chosen], want)
    together[chosen] = math.nan
    assert bool(together.isnan().all())


@pytest.mark.parametrize("fmt", ["w8a16", "w4a16"])
@pytest.mark.parametrize("walk", [8, 16, 32])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (24576, 4096), (4096, 12288), (1000, 1040)])
def test_programs_that_go_over_the_used_slots(
    fmt: str, walk: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has the bits that it has alone, in its place, and nothing else is written."""
    from mixquant_sglang.kernels.triton import packed_rows, packed_tiles

    if not packed_tiles.STRAIGHT:
        pytest.skip("with this Triton tiles serve few rows, and nothing walks")
    monkeypatch.setattr(packed_rows, "WALK", walk)
    weight, _ = packed(fmt, n, k)
    rows = torch.randn(256, k, dtype=torch.bfloat16, device="cuda")
    alone = torch.cat([packed_rows.linear_rows(row, weight) for row in rows.split(1)])
    index = torch.full((256,), -1, device="cuda")
    out = torch.full((300, n), math.nan, dtype=torch.bfloat16, device="cuda")
    packed_rows.linear_rows(rows, weight, out=out, index=index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed_rows.linear_rows(rows, weight, out=out, index=index)
    for used in (0, 1, 8, 9, 16, 17, 40, 64, 65, 256):
        chosen = torch.randperm(300)[:used].to("cuda")
        index.fill_(-1)
        index[:used] = chosen
        graph.replay()
        assert torch.equal(out[chosen], alone[:used]), used
        out[chosen] = math.nan
        assert bool(out.isnan().all()), used
