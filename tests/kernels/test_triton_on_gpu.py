"""Our Triton kernels on a GPU, bit for bit against plain torch; and plain torch on the GPU against the CPU."""

import math

import pytest
import torch

from mixquant_sglang.formats import fp8
from mixquant_sglang.formats import nvfp4 as reference
from mixquant_sglang.kernels.packing import quantize_nvfp4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

SHAPES = [(1, 16), (3, 48), (17, 4096), (1, 12288), (5, 11008), (2, 32768), (257, 208), (1000, 3584)]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal bits; any NaN equals any other."""
    want = want.to(got.device)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    real = ~got.isnan()
    assert torch.equal(got.view(integer)[real], want.view(integer)[real])


def tokens(m: int, k: int, kind: str) -> torch.Tensor:
    torch.manual_seed(m * k)
    x = torch.randn(m, k, device="cuda")
    if kind == "outliers":
        x[:, ::13] *= 1000
        x[::2, :16] = 0
        x[::3, -16:] = -0.0
        x[m // 2] = 0
    if kind == "magnitudes":  # BF16 subnormals to BF16's largest, some rows with a zero, tiny or non-finite element
        x *= torch.exp2(torch.linspace(-134, 126, m, device="cuda"))[:, None]
        x[1::5, 3] = 3e38
        x[2::7, 5] = math.inf
        x[4::7, 9] = math.nan
    if kind == "ties":
        x = (x * 4).round() / 4
    return x.bfloat16()


def qdq_activations(x: torch.Tensor) -> torch.Tensor:
    from mixquant_sglang.kernels.triton import activations

    return activations.quantize(x, "qdq")[0]


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "magnitudes", "ties"])
def test_qdq_activations(m: int, k: int, kind: str) -> None:
    x = tokens(m, k, kind)
    want = reference.quantize_activations(x.cpu()).dequantize()
    same(reference.quantize_activations(x).dequantize(), want)
    poison = torch.full_like(x, math.nan)  # the allocator hands this memory out again
    del poison
    same(qdq_activations(x), want)


def test_qdq_of_no_rows_and_of_one_row_in_a_batch() -> None:
    x = tokens(300, 2560, "outliers")
    assert qdq_activations(x[:0]).shape == (0, 2560)
    whole = qdq_activations(x)
    for i in (0, 7, 150, 299):
        same(qdq_activations(x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize(("n", "k"), [(1, 16), (33, 48), (4096, 4096), (1024, 11008), (7, 12288)])
def test_unscaled(n: int, k: int) -> None:
    from mixquant_sglang.kernels.triton.unpack import unscaled

    torch.manual_seed(0)
    x = torch.randn(n, k // 16, 16) * torch.exp2(torch.randint(-20, 6, (n, k // 16, 1)).float())
    x[:, 0] = 0
    w = reference.quantize(x.reshape(n, k).cuda())
    out = torch.full((n, k), math.nan, dtype=torch.bfloat16, device="cuda")
    assert unscaled(w.packed, w.block_scales, out) is out
    same(out, w.unscaled())
    same(unscaled(w.packed, w.block_scales), out)


def test_unscaled_of_every_code_and_scale() -> None:
    from mixquant_sglang.kernels.triton.unpack import unscaled

    packed = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
    want = reference.NVFP4Tensor(packed, scales, torch.tensor(1.0)).unscaled()
    same(unscaled(packed.cuda(), scales.cuda()), want)


@pytest.mark.parametrize("scales", reference.SCALE_MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_quantise_alike_on_cpu_and_gpu(scales: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(130, 1040, dtype=dtype) * torch.exp2(torch.randint(-12, 3, (130, 1)).float()).to(dtype)
    x[3] = 0
    cpu, gpu = reference.quantize(x, scales=scales), quantize_nvfp4(x.cuda(), scales=scales)
    same(gpu.tensor_scale, cpu.tensor_scale)
    differ = (gpu.block_scales.view(torch.uint8).cpu() != cpu.block_scales.view(torch.uint8)).float().mean()
    assert differ == 0 if scales == "absmax" else differ < 1e-3  # the order of a sum can decide between two scales
    if differ == 0:
        same(gpu.packed, cpu.packed)
        same(gpu.dequantize(), cpu.dequantize())
    same(gpu.swizzled_scales().view(torch.uint8).cpu(), gpu_scales_on_cpu(gpu).view(torch.uint8))


def gpu_scales_on_cpu(w: reference.NVFP4Tensor) -> torch.Tensor:
    moved = reference.NVFP4Tensor(w.packed.cpu(), w.block_scales.cpu(), w.tensor_scale.cpu())
    return moved.swizzled_scales()


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "magnitudes"])
def test_fp8_rows_quantise_alike_on_cpu_and_gpu(kind: str) -> None:
    x = tokens(131, 1000, kind)
    cpu, gpu = fp8.quantize_activations(x.cpu()), fp8.quantize_activations(x)
    same(gpu.scales, cpu.scales)
    same(gpu.dequantize(), cpu.dequantize())
    finite = cpu.scales.isfinite()
    same(gpu.data.view(torch.uint8)[finite.cuda()], cpu.data.view(torch.uint8)[finite])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_activations_neither_synchronise_nor_break_a_graph() -> None:
    from mixquant_sglang.kernels.triton.rows import gather_rows, scale_rows_, scatter_rows_

    x = tokens(9, 256, "gaussian")
    index = torch.tensor([2, -1, 5], device="cuda")
    out = x.clone()

    def passes() -> tuple[torch.Tensor, ...]:
        out.copy_(x)
        scatter_rows_(out, gather_rows(x, index) * 2, index)
        quantised = reference.quantize_activations(x)
        scale_rows_(out, quantised.row_scales)
        return qdq_activations(x), quantised.dequantize(), fp8.quantize_activations(x).dequantize()

    passes()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = passes()
    x.copy_(tokens(9, 256, "outliers"))
    index.copy_(torch.tensor([-1, 8, 0], device="cuda"))
    for tensor in (*results, out):
        tensor.fill_(math.nan)
    graph.replay()
    replayed = [tensor.clone() for tensor in (*results, out)]
    for got, want in zip(replayed, (*passes(), out), strict=True):
        same(got, want)
    doubled = x.clone()
    doubled[[8, 0]] *= 2
    same(out, (doubled.float() * reference.row_scales(x)[:, None]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("t", "k"), [(1, 1), (7, 16), (33, 4096), (5, 12289)])
def test_gather_and_scatter(t: int, k: int, dtype: torch.dtype) -> None:
    from mixquant_sglang.kernels.triton.rows import gather_rows, scatter_rows_

    torch.manual_seed(0)
    wide = torch.randn(t, k + 7, device="cuda").bfloat16()
    for x in (wide[:, :k].contiguous(), wide[:, 3 : k + 3]):  # rows that do not touch each other as well
        rows = torch.randperm(t)[: max(1, t // 2)].tolist()
        index = torch.tensor([-1, *rows, -1], dtype=dtype, device="cuda")
        got = gather_rows(x, index)
        same(got[1:-1], x[rows])
        assert not got[0].any() and not got[-1].any()
        want = x.clone()
        want[rows] = -x[rows]
        before = wide.clone()
        got[0] = got[-1] = math.nan  # unused slots are not read
        scatter_rows_(x, -got, index)
        same(x, want)
        if x.data_ptr() != wide.data_ptr() and x.stride(0) == wide.stride(0):
            same(wide[:, :3], before[:, :3])
            same(wide[:, k + 3 :], before[:, k + 3 :])
    assert gather_rows(wide, index[:0]).shape == (0, k + 7)


def test_scale_rows() -> None:
    from mixquant_sglang.kernels.triton.rows import scale_rows_

    x = tokens(64, 6145, "gaussian")
    for scales in (torch.exp2(torch.randint(-100, 100, (64,)).float()), torch.rand(64), torch.full((64,), math.nan)):
        out = x.clone()
        scale_rows_(out, scales.cuda())
        same(out, (x.float() * scales.cuda()[:, None]).bfloat16())
    scale_rows_(x[:0], scales[:0].cuda())


def test_refusals() -> None:
    from mixquant_sglang.kernels.triton import rows, unpack

    x = torch.zeros(4, 32, dtype=torch.bfloat16, device="cuda")
    scales = torch.zeros(4, 2, device="cuda").to(torch.float8_e4m3fn)
    packed = torch.zeros(4, 16, dtype=torch.uint8, device="cuda")
    for call in (
        lambda: qdq_activations(x.float()),
        lambda: qdq_activations(x.t()),
        lambda: qdq_activations(x.cpu()),
        lambda: qdq_activations(torch.zeros(2, 24, dtype=torch.bfloat16, device="cuda")),
        lambda: unpack.unscaled(packed, scales[:2]),
        lambda: unpack.unscaled(packed, scales, x[:2]),
        lambda: unpack.unscaled(packed, scales.view(torch.uint8)),
        lambda: rows.gather_rows(x.t(), torch.zeros(2, dtype=torch.int64, device="cuda")),
        lambda: rows.gather_rows(x, torch.zeros(2, device="cuda")),
        lambda: rows.gather_rows(x.cpu(), torch.zeros(2, dtype=torch.int64, device="cuda")),
        lambda: rows.scatter_rows_(x, x[:2], torch.zeros(3, dtype=torch.int64, device="cuda")),
        lambda: rows.scatter_rows_(x, x[:2].float(), torch.zeros(2, dtype=torch.int64, device="cuda")),
        lambda: rows.scale_rows_(x, torch.zeros(3, device="cuda")),
        lambda: rows.scale_rows_(x.float(), torch.zeros(4, device="cuda")),
    ):
        with pytest.raises(ValueError, match=r"must|needs|do not fit|cannot be accessed"):
            call()
