"""FP8 weights in blocks of 128 x 128 on a GPU: few BF16 rows against float64, and W8A8 against the emulated kernel."""

import pytest
import torch

from mixquant_sglang.formats.fp8_blocks import FP8Blocks, blocks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

SHAPES = [(6144, 4096), (4096, 12288), (1024, 3584), (96, 128), (40, 48), (1000, 1040)]


def weight(n: int, k: int) -> FP8Blocks:
    """Neighbouring blocks have scales far apart, so that a wrong one shows."""
    torch.manual_seed(n + k)
    codes = (torch.randn(n, k, device="cuda") * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.exp2(torch.randint(-12, -4, (blocks_of(n), blocks_of(k)), device="cuda").float()) * 1.37
    return FP8Blocks(codes, scales)


def values(w: FP8Blocks) -> torch.Tensor:
    n, k = w.shape
    scales = w.scales.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return w.data.double() * scales


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 7, 16, 17, 64, 100, 300])
def test_against_float64(n: int, k: int, m: int) -> None:
    from mixquant_sglang.kernels.triton.block_rows import block_rows

    w = weight(n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    want = x.double() @ values(w).t()
    may = 2**-20 * (x.double().abs() @ values(w).abs().t())
    for b in (None, bias):
        wanted = want if b is None else want + b.double()
        out = block_rows(x, w.data, w.scales, b)
        assert bool(((out.double() - wanted).abs() <= may + wanted.abs() * 2**-8).all())


@pytest.mark.parametrize("m", [16, 64, 300])
def test_a_row_does_not_depend_on_the_others(m: int) -> None:
    from mixquant_sglang.kernels.triton.block_rows import block_rows

    w = weight(4096, 4096)
    x = torch.randn(m, 4096, dtype=torch.bfloat16, device="cuda")
    out = block_rows(x, w.data, w.scales)
    others = torch.randn_like(x) * 1e4
    others[::3] = x[::3]
    assert torch.equal(block_rows(others, w.data, w.scales)[::3], out[::3])


@pytest.mark.parametrize(("used", "slots"), [(0, 64), (1, 64), (40, 64), (100, 256)])
def test_in_a_graph_in_the_places_of_rows(used: int, slots: int) -> None:
    from mixquant_sglang.kernels.triton.block_rows import block_rows

    w = weight(6144, 4096)
    rows = torch.randn(slots, 4096, dtype=torch.bfloat16, device="cuda")
    index = torch.full((slots,), -1, dtype=torch.int64, device="cuda")
    first = torch.full((300, 4096), 7.0, dtype=torch.bfloat16, device="cuda")
    rest = torch.full((300, 2048), 7.0, dtype=torch.bfloat16, device="cuda")
    block_rows(rows, w.data, w.scales, out=first, index=index, rest=rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_rows(rows, w.data, w.scales, out=first, index=index, rest=rest)
    index[:used] = torch.arange(299, 299 - used, -1, device="cuda")
    graph.replay()
    want = torch.full((300, 6144), 7.0, dtype=torch.bfloat16, device="cuda")
    if used:
        want[index[:used]] = block_rows(rows, w.data, w.scales)[:used]
    assert torch.equal(torch.cat((first, rest), 1), want)


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (704, 384), (40, 128)])
@pytest.mark.parametrize("m", [1, 17, 300])
def test_sglangs_linear_gives_the_numbers_of_the_emulated_kernel(n: int, k: int, m: int) -> None:
    """It sums in another order.  Scales are powers of two, so that no quotient is rounded before it becomes a code: of
    others either quantiser may round an element on a boundary to the other code."""
    from mixquant_sglang.kernels.environment import Environment
    from mixquant_sglang.kernels.linear.fp8_blocks import EmulatedBlockFP8, NativeBlockFP8
    from mixquant_sglang.recipe.select import Device
    from mixquant_sglang.versions.fp8_blocks import block_linear

    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        pytest.skip(f"FP8 is native from SM89 on, this is SM{capability[0]}{capability[1]}")
    w = weight(n, k)
    environment = Environment(fp8_block_linear=block_linear(Device("", capability)))
    native = NativeBlockFP8(torch.empty(0), ready=[w], environment=environment)
    emulated = EmulatedBlockFP8(torch.empty(0), ready=[w])
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda").clamp(-3.25, 3.25)
    x[:, ::128] = 3.5  # 448 / 128
    out, want = native.matmul(x, None).float(), emulated.matmul(x, None).float()
    assert float((out - want).norm() / want.norm()) < 4e-3
