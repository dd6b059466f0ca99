"""The BF16 linear of a few protected rows on a GPU: against float64, and what it must leave alone."""

import math

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

SHAPES = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (1024, 3584), (96, 64), (40, 48), (3072, 1536)]
TOKENS = 300
USED = [(0, 64), (1, 1), (1, 256), (5, 7), (16, 64), (17, 64), (33, 256), (64, 64), (65, 256), (129, 256), (256, 256)]


def operands(n: int, k: int, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(n + k)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    rows = torch.randn(slots, k, dtype=torch.bfloat16, device="cuda")
    return weight, rows, torch.full((TOKENS, n), math.nan, dtype=torch.bfloat16, device="cuda")


def index_of(used: list[int], slots: int) -> torch.Tensor:
    return torch.tensor(used + [-1] * (slots - len(used)), device="cuda")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(("used", "slots"), USED)
def test_against_float64(n: int, k: int, used: int, slots: int, bias: bool) -> None:
    from mixquant_sglang.kernels.triton.few_rows import linear_rows_

    weight, rows, out = operands(n, k, slots)
    chosen = torch.randperm(TOKENS)[:used].tolist()
    b = torch.randn(n, dtype=torch.bfloat16, device="cuda") if bias else None
    linear_rows_(out, index_of(chosen, slots), rows, weight, b)
    want = rows[:used].double() @ weight.double().t() + (b.double() if b is not None else 0)
    # BF16 rounds to 2^-9 of the value; FP32 sums of K products are off by far less than 2^-9 of their typical size.
    bound = want.abs() * 2**-8 + 2**-9 * math.sqrt(k) * 2**-6
    assert bool(((out[chosen].double() - want).abs() <= bound).all())
    others = [i for i in range(TOKENS) if i not in chosen]
    assert bool(out[others].isnan().all())


@pytest.mark.parametrize(("n", "k", "cut"), [(6144, 4096, 4096), (512, 256, 256), (320, 64, 192)])
@pytest.mark.parametrize("used", [1, 30, 90])
def test_in_two_matrices(n: int, k: int, cut: int, used: int) -> None:
    from mixquant_sglang.kernels.triton.few_rows import linear_rows_

    weight, rows, out = operands(n, k, 256)
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    index = index_of(list(range(5, 5 + used)), 256)
    linear_rows_(out, index, rows, weight, bias)
    first, rest = (torch.full((TOKENS, size), math.nan, dtype=torch.bfloat16, device="cuda") for size in (cut, n - cut))
    linear_rows_(first, index, rows, weight, bias, rest=rest)
    together = torch.cat([first, rest], dim=1)
    assert torch.equal(together.isnan(), out.isnan())
    assert torch.equal(together.nan_to_num(), out.nan_to_num())


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    from mixquant_sglang.kernels.triton.few_rows import linear_rows_

    for n in (4096, 6144, 24576):  # of each kind of tile
        weight, rows, out = operands(n, 4096, 256)
        for used in (20, 40, 64, 100, 256):  # by each of its loops
            linear_rows_(out, index_of(list(range(used)), 256), rows, weight)
            for i in {0, 15, 16, used - 1}:
                alone = torch.full_like(out, math.nan)
                linear_rows_(alone, index_of([7], 1), rows[i : i + 1], weight)
                assert torch.equal(alone[7], out[i])


def test_in_a_graph_whose_rows_change() -> None:
    from mixquant_sglang.kernels.triton.few_rows import linear_rows_

    weight, rows, out = operands(6144, 4096, 64)
    index = index_of([], 64)
    linear_rows_(out, index, rows, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear_rows_(out, index, rows, weight)
    for used in ([3], [], list(range(100, 140)), [299, 0]):
        out.fill_(math.nan)
        index.copy_(index_of(used, 64))
        graph.replay()
        assert sorted(used) == (~out.isnan().any(dim=1)).nonzero().flatten().tolist()


def test_refusals() -> None:
    from mixquant_sglang.kernels.triton.few_rows import linear_rows_

    weight, rows, out = operands(96, 64, 4)
    index = index_of([1], 4)
    linear_rows_(out, index[:0], rows[:0], weight)
    for arguments in (
        (out.float(), index, rows, weight, None),
        (out[:, :48], index, rows, weight, None),
        (out, index.int(), rows, weight, None),
        (out, index, rows[:3], weight, None),
        (out, index, rows, weight.t().contiguous().t(), None),
        (out, index, rows[:, :40].contiguous(), weight[:, :40].contiguous(), None),
        (out, index, rows, weight, torch.zeros(95, dtype=torch.bfloat16, device="cuda")),
    ):
        with pytest.raises(ValueError, match="must be"):
            linear_rows_(*arguments)
