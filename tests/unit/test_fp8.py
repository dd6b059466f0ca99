"""FP8 rows against an independent reference: a float64 E4M3 grid and NumPy FP32 steps."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mixquant_sglang.formats import fp8

E4M3 = np.array([(b & 7) * 2.0**-9 if b < 8 else (8 + (b & 7)) * 2.0 ** ((b >> 3) - 10) for b in range(127)])
F32 = np.float32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: OpenMP barriers cost far more than they save when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 bytes [N, K] and scales [N]: code = nearest(x * (1/scale)), ties to the even code."""
    values = x.float().numpy()
    scale = np.maximum(np.abs(values).max(-1) / F32(448), F32(2.0**-126))
    scaled = (values * (F32(1) / scale)[:, None]).astype(F32)
    middle = (E4M3[:-1] + E4M3[1:]) / 2
    magnitude = np.abs(scaled).astype(np.float64)
    code = np.searchsorted(middle, magnitude, side="left")
    code = code + (np.isin(magnitude, middle) & (code % 2 == 1))
    return code + 128 * np.signbit(scaled), scale


def rows(name: str, n: int, k: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(n, k)
    if name == "outliers":
        x[:, ::7] *= 100
    if name == "wide":
        x *= torch.exp2(torch.randint(-20, 5, (n, k)).float())
    return x * torch.exp2(torch.linspace(-6, 6, n))[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gaussian", "outliers", "wide"])
def test_codes_and_scales_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    x = rows(name, 37, 200).to(dtype)
    x[5] = 0
    q = fp8.quantize(x)
    codes, scales = reference(x)
    assert q.data.dtype == torch.float8_e4m3fn and q.scales.dtype == torch.float32 and q.scales.shape == (37,)
    np.testing.assert_array_equal(q.scales.numpy(), scales)
    np.testing.assert_array_equal(q.data.view(torch.uint8).numpy(), codes)
    values = (np.where(codes < 128, 1, -1) * E4M3[codes & 127]).astype(F32) * scales[:, None]
    np.testing.assert_array_equal(q.dequantize(torch.float32).numpy(), values)
    assert torch.equal(q.dequantize(), torch.from_numpy(values).bfloat16())
    assert q.shape == (37, 200) and q.nbytes == 37 * 200 + 37 * 4
    assert torch.equal(fp8.quantize_activations(x).data.view(torch.uint8), q.data.view(torch.uint8))


def test_error_is_what_the_format_costs() -> None:
    x = rows("gaussian", 256, 256)
    error = (fp8.quantize(x).dequantize(torch.float32) - x).norm() / x.norm()
    assert 0.025 < error < 0.028


def test_largest_element_of_a_row_is_code_448() -> None:
    q = fp8.quantize(rows("gaussian", 64, 64))
    assert (q.data.float().abs().amax(-1) == 448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_huge_and_zero_rows_stay_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([2.0**-133, 2.0**-120, 0.0, -0.0, 1.0, 3.3e38])[:, None] * torch.ones(1, 16)
    q = fp8.quantize(x.to(dtype))
    got = q.dequantize(torch.float32)
    assert got.isfinite().all() and not got[2:4].any() and (q.scales > 0).all()
    torch.testing.assert_close(got[4:], x[4:], rtol=0.01, atol=0)
    torch.testing.assert_close(got[0], x[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("m", [0, 1, 3, 65])
def test_a_row_does_not_depend_on_its_neighbours(m: int) -> None:
    x = rows("outliers", m, 48).bfloat16()
    q = fp8.quantize_activations(x)
    assert q.dequantize().shape == (m, 48) and q.dequantize().dtype == torch.bfloat16
    for i in range(m):
        alone = fp8.quantize_activations(x[i : i + 1])
        assert torch.equal(alone.data[0].view(torch.uint8), q.data[i].view(torch.uint8))
        assert alone.scales[0] == q.scales[i]


def test_strided_inputs_parameters_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows("gaussian", 24, 40)
    for view in (x.t(), x[::2, 3:30], torch.nn.Parameter(x)):
        a, b = fp8.quantize(view), fp8.quantize(view.detach().contiguous())
        assert torch.equal(a.dequantize(), b.dequantize())
    whole = fp8.quantize(x)
    monkeypatch.setattr(fp8, "_CHUNK", 100)
    assert torch.equal(fp8.quantize(x).dequantize(), whole.dequantize())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(bad: float) -> None:
    x = rows("gaussian", 4, 32)
    x[2, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        fp8.quantize(x)
    got = fp8.quantize_activations(x).dequantize()
    assert got[2].isnan().all() and got[[0, 1, 3]].isfinite().all()


def test_refusals_say_what_is_allowed() -> None:
    for shape in ((2, 0), (16,), (2, 2, 16)):
        with pytest.raises(ValueError, match="matrix with at least one column"):
            fp8.quantize(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"bfloat16, torch.float16 here, got torch.float64"):
        fp8.quantize(torch.zeros(2, 16, dtype=torch.float64))


def test_activations_never_ask_the_device_for_a_value() -> None:
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")  # has no values: .item() and the like raise
    assert fp8.quantize_activations(x).dequantize().shape == (3, 64)
