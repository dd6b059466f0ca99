"""The scale search on a GPU: the bits of plain torch on the CPU, and its time for a model of 8B parameters."""

import math
from collections.abc import Callable

import pytest
import torch

from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels.packing import has_search, quantize_nvfp4

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

SHAPES = [(0, 16), (1, 16), (33, 48), (257, 208), (100, 11008), (512, 4096)]
QWEN3_8B = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]  # qkv, o, gate and up, down; 36 layers
PARAMETERS = 8e9


def student(n: int, k: int) -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((n, k))


def binades(n: int, k: int) -> torch.Tensor:
    """Every exponent of FP32, subnormals too: scales that are zero, subnormal and saturated."""
    return torch.randn(n, k).clamp(-3, 3) * torch.exp2(torch.randint(-148, 126, (n, k // 16)).repeat_interleave(16, 1))


def signed_zeros(n: int, k: int) -> torch.Tensor:
    x = torch.zeros(n, k).copysign(torch.randn(n, k))
    x[:1, :1] = 1
    return x


KINDS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "gaussian": torch.randn,
    "laplace": lambda n, k: torch.distributions.Laplace(0.0, 1.0).sample((n, k)),
    "student": student,
    "ties": lambda n, k: (torch.randn(n, k) * 4).round() / 4,
    "constant": lambda n, k: torch.full((n, k), 0.3),
    "zero": torch.zeros,
    "signed zeros": signed_zeros,
    "tiny": lambda n, k: torch.randn(n, k) * 1e-38,
    "huge": lambda n, k: torch.randn(n, k).clamp(-3, 3) * 1e38,
    "binades": binades,
}


def same(got: nvfp4.NVFP4Tensor, want: nvfp4.NVFP4Tensor) -> None:
    assert torch.equal(got.tensor_scale.cpu(), want.tensor_scale.cpu())
    assert torch.equal(got.block_scales.view(torch.uint8).cpu(), want.block_scales.view(torch.uint8).cpu())
    assert torch.equal(got.packed.cpu(), want.packed.cpu())


def by_torch(x: torch.Tensor, **options: object) -> nvfp4.NVFP4Tensor:
    """The plain torch of ``quantize`` on ``x``'s own device."""
    return nvfp4.quantize(x, scales="search", **options)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_torch_on_the_cpu(kind: str, n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n * k)
    x = KINDS[kind](n, k).to(dtype)
    energy = (torch.randn(k) * 2).exp().square()
    energy[: k // 3] = 0
    assert has_search(torch.device("cuda"))
    for outer in (None, 0.000731, 2.0**-126, 2.0**126):
        want = by_torch(x, tensor_scale=outer)
        poison = torch.full((n, k), math.nan, device="cuda")  # the allocator hands this memory out again
        del poison
        same(quantize_nvfp4(x.cuda(), scales="search", tensor_scale=outer), want)
        same(by_torch(x.cuda(), tensor_scale=outer), want)
    weighted = by_torch(x, column_weights=energy)
    same(quantize_nvfp4(x.cuda(), scales="search", column_weights=energy), weighted)
    same(by_torch(x.cuda(), column_weights=energy), weighted)


def test_strides_and_float16() -> None:
    torch.manual_seed(0)
    x = student(96, 160).half()
    for view in (lambda x: x, lambda x: x.t(), lambda x: x[::3, 16:64], lambda x: x[:, :48].t()):
        same(quantize_nvfp4(view(x.cuda()), scales="search"), by_torch(view(x)))


def test_equal_at_the_edge_of_every_choice() -> None:
    """For each block, one weight of one column where the choice changes, to the last bit of the weight: nothing but the
    same error to the last bit chooses alike around it."""
    torch.manual_seed(0)
    x, energy = student(1, 1 << 18), torch.rand(1 << 18) * 0.2
    energy[::16] = 1  # the largest, so that the ratios stay as they are
    low, high = torch.full((len(energy) // 16,), 2.0**-20), torch.ones(len(energy) // 16)

    def choice(weight: torch.Tensor) -> torch.Tensor:
        energy[15::16] = weight
        return by_torch(x, column_weights=energy).block_scales.view(torch.uint8)[0]

    before = choice(low)
    assert (choice(high) != before).float().mean() > 0.3
    for _ in range(50):
        middle = (low + high) / 2
        as_low = choice(middle) == before
        low, high = torch.where(as_low, middle, low), torch.where(as_low, high, middle)
    for step in range(-6, 7):
        energy[15::16] = (high.view(torch.int32) + step).view(torch.float32).clamp(max=1)
        same(quantize_nvfp4(x.cuda(), scales="search", column_weights=energy), by_torch(x, column_weights=energy))


def test_refusals() -> None:
    from mixquant_sglang.kernels.triton.scale_search import quantize_

    x = torch.zeros(4, 32, device="cuda")
    packed, scales = nvfp4._empty_codes(x)
    for call in (
        lambda: quantize_(packed[:2], scales, x, 1.0),
        lambda: quantize_(packed.int(), scales, x, 1.0),
        lambda: quantize_(packed, scales.view(torch.uint8), x, 1.0),
        lambda: quantize_(packed, scales, x, 1.0, torch.ones(16, device="cuda")),
        lambda: quantize_(packed, scales, x, 1.0, torch.ones(32, device="cuda").double()),
    ):
        with pytest.raises(ValueError, match="must be contiguous"):
            call()


def test_time_for_8b_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds for the linears of one layer, scaled to 8e9 weights; the kernel compiled, everything else counted."""

    def seconds(quantize: Callable[[torch.Tensor], nvfp4.NVFP4Tensor]) -> float:
        quantize(weights[0])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for weight in weights:
            quantize(weight)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 * PARAMETERS / sum(w.numel() for w in weights)

    torch.manual_seed(0)
    weights = [(torch.randn(n, k, device="cuda") * 0.02).bfloat16() for n, k in QWEN3_8B]
    energy = {k: torch.rand(k, device="cuda") for _, k in QWEN3_8B}
    times = {
        "absmax, torch": seconds(nvfp4.quantize),
        "search, torch": seconds(by_torch),
        "search, kernel": seconds(lambda w: quantize_nvfp4(w, scales="search")),
        "weighted, kernel": seconds(lambda w: quantize_nvfp4(w, scales="search", column_weights=energy[w.shape[1]])),
    }
    with capsys.disabled():
        name = torch.cuda.get_device_name()
        print(f"\n{name}, 8e9 weights: " + ", ".join(f"{what} {t:.3f} s" for what, t in times.items()))
    assert times["search, kernel"] < 20
    assert times["search, kernel"] < times["search, torch"]
