"""NVFP4 numbers against an independent reference: float64 grids, NumPy FP32 steps, no code shared with the package."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mixquant_sglang.formats import nvfp4, scale_layout

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array([(b & 7) * 2.0**-9 if b < 8 else (8 + (b & 7)) * 2.0 ** ((b >> 3) - 10) for b in range(127)])
F32 = np.float32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: OpenMP barriers cost far more than they save when the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def nearest(grid: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Index of the nearest grid point, ties to the even index, saturating."""
    value = value.astype(np.float64)
    middle = (grid[:-1] + grid[1:]) / 2
    index = np.searchsorted(middle, value, side="left")  # number of middles below the value
    tie = np.isin(value, middle) & (index % 2 == 1)
    return np.minimum(index + tie, len(grid) - 1)


def reference(x: torch.Tensor, tensor_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] and E4M3 bytes [N, K/16] by the algorithm that nvfp4.py quotes, one FP32 rounding at each step."""
    values = x.float().numpy()
    blocks = values.reshape(values.shape[0], -1, 16)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        g = F32(1) / F32(tensor_scale)
        amax = np.abs(blocks).max(-1)
        scale = nearest(E4M3, amax * (g * (F32(1) / F32(6))))
        encode = F32(1) / (E4M3[scale].astype(F32) * (F32(1) / g))
        encode = np.where(amax == 0, F32(0), np.minimum(encode, np.finfo(F32).max))
        scaled = (blocks * encode[..., None]).astype(F32)
    codes = nearest(E2M1, np.abs(scaled)) + 8 * np.signbit(scaled)
    return codes.reshape(values.shape), scale


def codes_of(packed: torch.Tensor) -> np.ndarray:
    return np.stack([packed.numpy() & 15, packed.numpy() >> 4], -1).reshape(packed.shape[0], -1)


def bytes_of(scales: torch.Tensor) -> np.ndarray:
    return scales.view(torch.uint8).numpy()


def values_of(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """e2m1 * e4m3 in float64."""
    e2m1 = np.where(codes < 8, 1.0, -1.0) * E2M1[codes & 7]
    return e2m1 * np.repeat(E4M3[scales], 16, axis=-1)


def sample(name: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    if name == "gaussian":
        return torch.randn(n, k)
    if name == "laplace":
        return torch.distributions.Laplace(0.0, 1.0).sample((n, k))
    if name == "student":
        return torch.distributions.StudentT(3.0).sample((n, k))
    if name == "uniform":
        return torch.rand(n, k) * 2 - 1
    assert name == "wide"  # every binade, so that scales are subnormal, zero and saturated
    binade = torch.randint(-30, 6, (n, k // 16, 1)).float()
    return (torch.randn(n, k // 16, 16) * torch.exp2(binade)).reshape(n, k)


NAMES = ("gaussian", "laplace", "student", "uniform", "wide")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tensor_scale", [None, 2.0**-10, 0.000731])
def test_codes_and_scales_equal_the_reference(name: str, dtype: torch.dtype, tensor_scale: float | None) -> None:
    x = sample(name, 37, 176).to(dtype)
    q = nvfp4.quantize(x, tensor_scale=tensor_scale)
    outer = F32(x.float().abs().max().item()) / F32(2688) if tensor_scale is None else F32(tensor_scale)
    assert q.tensor_scale.item() == outer and q.tensor_scale.dtype == torch.float32 and q.tensor_scale.ndim == 0
    codes, scales = reference(x, float(outer))
    np.testing.assert_array_equal(bytes_of(q.block_scales), scales)
    np.testing.assert_array_equal(codes_of(q.packed), codes)
    np.testing.assert_array_equal(q.unscaled(torch.float64).numpy(), values_of(codes, scales))
    expected = (values_of(codes, scales).astype(F32) * outer).astype(F32)
    np.testing.assert_array_equal(q.dequantize(torch.float32).numpy(), expected)
    assert torch.equal(q.dequantize(torch.bfloat16), torch.from_numpy(expected).bfloat16())
    assert q.shape == (37, 176) and q.nbytes == 37 * 176 // 2 + 37 * 11 + 4


def test_ties_go_to_the_even_code_and_the_low_nibble_is_the_even_element() -> None:
    row = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -0.0]
    q = nvfp4.quantize(torch.tensor([row]), tensor_scale=1.0)
    assert codes_of(q.packed)[0].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 8, 10, 10, 12, 12, 14, 14, 8]
    assert q.packed[0, 0].item() == 0x07
    above = torch.nextafter(torch.tensor(row[:8]), torch.tensor(10.0))[1:]
    q = nvfp4.quantize(torch.cat([torch.tensor([6.0]), above, -above, torch.zeros(1)])[None], tensor_scale=1.0)
    assert codes_of(q.packed)[0].tolist() == [7, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 0]


def test_every_e2m1_times_e4m3_is_exact_in_bf16_and_fp16() -> None:
    packed = torch.arange(16, dtype=torch.uint8).reshape(1, 8, 2)
    packed = (packed[..., 0] | packed[..., 1] << 4).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    q = nvfp4.NVFP4Tensor(packed, scales, torch.tensor(1.0))
    expected = values_of(np.arange(16)[None].repeat(127, 0), np.arange(127)[:, None])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        got = q.unscaled(dtype).double().numpy()
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def test_requantising_the_values_changes_nothing() -> None:
    x = sample("gaussian", 16, 128)
    x.view(16, -1, 16)[..., 3] = 9.0  # every block's largest element becomes code 7
    q = nvfp4.quantize(x)
    again = nvfp4.quantize(q.dequantize(torch.float32), tensor_scale=q.tensor_scale)
    assert torch.equal(again.packed, q.packed)
    assert torch.equal(again.block_scales.view(torch.uint8), q.block_scales.view(torch.uint8))


def test_error_is_what_the_format_costs() -> None:
    x = sample("gaussian", 256, 256)
    error = (nvfp4.quantize(x).dequantize(torch.float32) - x).norm() / x.norm()
    assert 0.093 < error < 0.097


@pytest.mark.parametrize("scales", nvfp4.SCALE_MODES)
def test_zero_tensor_and_zero_blocks(scales: str) -> None:
    q = nvfp4.quantize(torch.zeros(3, 32), scales=scales)
    assert q.tensor_scale.item() == 1 and not q.packed.any() and not bytes_of(q.block_scales).any()
    x = sample("gaussian", 4, 64)
    x[:, 16:32] = 0
    x[2] = -0.0
    q = nvfp4.quantize(x, scales=scales)
    assert not q.packed[:2, 8:16].any() and not bytes_of(q.block_scales)[:, 1].any()
    assert (q.packed[2] == 0x88).all() and not q.dequantize(torch.float32)[2].any()
    assert nvfp4.quantize(torch.zeros(0, 32), scales=scales).shape == (0, 32)


@pytest.mark.parametrize("scales", nvfp4.SCALE_MODES)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-37, 1e-30, 1e30, 3.4e38])
def test_extreme_magnitudes_stay_finite(scales: str, magnitude: float) -> None:
    x = (sample("uniform", 4, 64) * magnitude).float()
    x[0, 0] = magnitude
    q = nvfp4.quantize(x, scales=scales)
    assert q.dequantize(torch.float32).isfinite().all() and 0 < q.tensor_scale.item() < math.inf
    if magnitude > 1e-37:
        error = (q.dequantize(torch.float64) - x.double()).norm() / x.double().norm()
        assert error < 0.13


@pytest.mark.parametrize("scales", nvfp4.SCALE_MODES)
def test_a_small_tensor_scale_saturates(scales: str) -> None:
    q = nvfp4.quantize(torch.full((2, 16), 1e4), scales=scales, tensor_scale=1.0)
    assert torch.equal(q.dequantize(torch.float32), torch.full((2, 16), 2688.0))
    x = torch.full((1, 16), -3e38)
    x[0, 5] = 0
    q = nvfp4.quantize(x, scales=scales, tensor_scale=2.0**-126)
    assert q.dequantize(torch.float32)[0, 0] == -2688 * 2.0**-126 and q.dequantize(torch.float32)[0, 5] == 0


def test_blocks_below_the_least_scale_are_zero() -> None:
    x = torch.full((1, 32), 2.0**-12)
    x[0, :16] = 6.0
    q = nvfp4.quantize(x, tensor_scale=1.0)
    assert bytes_of(q.block_scales).tolist() == [[0x38, 0]] and not q.dequantize(torch.float32)[0, 16:].any()
    x[0, 16:] = 6 * 3 * 2.0**-9  # a subnormal E4M3
    q = nvfp4.quantize(x, tensor_scale=1.0)
    assert bytes_of(q.block_scales).tolist() == [[0x38, 3]] and torch.equal(q.dequantize(torch.float32), x)


def test_strided_inputs_and_parameters() -> None:
    x = sample("gaussian", 64, 96).bfloat16()
    for view in (x.t(), x[::2, 32:64], x[:, :48].t()):
        for scales in nvfp4.SCALE_MODES:
            assert_same(nvfp4.quantize(view, scales=scales), nvfp4.quantize(view.contiguous(), scales=scales))
        a, b = nvfp4.quantize_activations(view), nvfp4.quantize_activations(view.contiguous())
        assert torch.equal(a.packed, b.packed) and torch.equal(a.row_scales, b.row_scales)
    assert_same(nvfp4.quantize(torch.nn.Parameter(x)), nvfp4.quantize(x))


def assert_same(a: nvfp4.NVFP4Tensor, b: nvfp4.NVFP4Tensor) -> None:
    assert torch.equal(a.packed, b.packed) and torch.equal(a.tensor_scale, b.tensor_scale)
    assert torch.equal(a.block_scales.view(torch.uint8), b.block_scales.view(torch.uint8))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample("student", 11, 64).bfloat16()
    whole, rows = nvfp4.quantize(x, scales="search"), nvfp4.quantize_activations(x)
    monkeypatch.setattr(nvfp4, "_chunks", lambda x: (slice(i, i + 3) for i in range(0, x.shape[0], 3)))
    assert_same(nvfp4.quantize(x, scales="search"), whole)
    assert torch.equal(nvfp4.quantize_activations(x).dequantize(), rows.dequantize())
    assert torch.equal(whole.dequantize(), nvfp4.quantize(x, scales="search").dequantize())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_in_a_weight_are_refused(bad: float) -> None:
    x = torch.zeros(4, 32)
    x[2, 7] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        nvfp4.quantize(x, tensor_scale=1.0)


def test_refusals_say_what_is_allowed() -> None:
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="'absmax', 'search'"):
        nvfp4.quantize(x, scales="mse")
    for shape in ((2, 24), (2, 0), (16,), (2, 2, 16)):
        with pytest.raises(ValueError, match="multiple of 16"):
            nvfp4.quantize(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"got torch.float64"):
        nvfp4.quantize(x.double())
    with pytest.raises(ValueError, match=r"bfloat16 here, got torch.float32"):
        nvfp4.quantize_activations(x)
    for bad in (0.0, -1.0, math.nan, math.inf, 1e-40):
        with pytest.raises(ValueError, match="tensor_scale must be in"):
            nvfp4.quantize(x + 1, tensor_scale=bad)


@pytest.mark.parametrize(("n", "k"), [(1, 16), (128, 64), (129, 80), (200, 2048), (257, 48), (64, 11008)])
def test_swizzle_is_the_128x4_formula(n: int, k: int) -> None:
    blocks = k // 16
    scales = torch.randint(1, 127, (n, blocks), dtype=torch.uint8).view(torch.float8_e4m3fn)
    q = nvfp4.NVFP4Tensor(torch.zeros(n, k // 2, dtype=torch.uint8), scales, torch.tensor(1.0))
    swizzled = q.swizzled_scales()
    rows, cols = math.ceil(n / 128) * 128, math.ceil(blocks / 4) * 4
    assert swizzled.shape == (rows, cols) and swizzled.dtype == torch.float8_e4m3fn and swizzled.is_contiguous()
    m, b = np.meshgrid(np.arange(n), np.arange(blocks), indexing="ij")
    offset = ((m // 128) * (cols // 4) + b // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + b % 4
    flat = bytes_of(swizzled).reshape(-1)
    np.testing.assert_array_equal(flat[offset], bytes_of(scales))
    assert np.count_nonzero(flat) == n * blocks  # padding is zero
    back = scale_layout.unswizzle_scales(swizzled, n, k)
    assert back.dtype == torch.float8_e4m3fn and np.array_equal(bytes_of(back), bytes_of(scales))
    assert torch.equal(
        scale_layout.unswizzle_scales(swizzled.view(torch.uint8).flatten(), n, k), scales.view(torch.uint8)
    )


def test_unswizzle_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="are 512 bytes"):
        scale_layout.unswizzle_scales(torch.zeros(511, dtype=torch.uint8), 1, 16)
    with pytest.raises(ValueError, match="multiple of 16"):
        scale_layout.unswizzle_scales(torch.zeros(512, dtype=torch.uint8), 1, 24)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        scale_layout.unswizzle_scales(torch.zeros(512), 1, 16)


def block_errors(x: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    return ((x.double() - values.double()) ** 2).reshape(-1, 16).sum(-1).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_search_makes_no_block_worse_and_nearly_finds_the_best_scale(name: str) -> None:
    x = sample(name, 64, 512)
    absmax, search = nvfp4.quantize(x), nvfp4.quantize(x, scales="search")
    assert absmax.tensor_scale == search.tensor_scale
    before = block_errors(x, absmax.dequantize(torch.float64))
    after = block_errors(x, search.dequantize(torch.float64))
    assert (after <= before * (1 + 1e-6)).all()

    outer = float(search.tensor_scale)
    blocks = np.abs(x.double().numpy().reshape(-1, 16)) / outer
    best = np.full(len(blocks), np.inf)
    for scale in E4M3[1:]:
        values = E2M1[nearest(E2M1, blocks / scale)] * scale
        best = np.minimum(best, ((values - blocks) ** 2).sum(-1) * outer**2)
    assert after.sum() <= best.sum() * 1.02
    if name == "gaussian":
        assert after.sum() <= 0.75 * before.sum()


def test_search_finds_four_over_six() -> None:
    x = torch.tensor([[4.0, 3.0, 3.0, -3.0, 2.0, 1.0, 1.0, 0.5] * 2])  # exact with scale 1; absmax would take .6875
    q = nvfp4.quantize(x, scales="search", tensor_scale=1.0)
    assert q.block_scales.float().item() == 1.0 and torch.equal(q.dequantize(torch.float32), x)


def test_search_depends_on_the_block_alone() -> None:
    x = sample("student", 8, 64)
    q = nvfp4.quantize(x, scales="search", tensor_scale=0.001)
    for i in range(8):
        alone = nvfp4.quantize(x[i : i + 1], scales="search", tensor_scale=0.001)
        assert torch.equal(alone.packed[0], q.packed[i])


def energies(kind: str, k: int) -> torch.Tensor:
    """Mean squares of inputs by column."""
    torch.manual_seed(1)
    spread = torch.randn(k).exp().square()
    if kind == "outliers":
        spread = torch.ones(k)
        spread[:: k // 8] = 900
    if kind == "dead":
        spread[::2] = 0
        spread[16:48] = 0
    return spread


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["spread", "outliers", "dead"])
def test_column_weights_lower_the_weighted_error_and_make_no_block_worse(name: str, kind: str) -> None:
    x, energy = sample(name, 64, 512), energies(kind, 512)
    weighted = nvfp4.quantize(x, scales="search", column_weights=energy)
    assert weighted.tensor_scale == nvfp4.quantize(x).tensor_scale

    def errors(q: nvfp4.NVFP4Tensor) -> np.ndarray:
        return block_errors(x * energy.sqrt(), q.dequantize(torch.float64) * energy.sqrt().double())

    before, plain, after = errors(nvfp4.quantize(x)), errors(nvfp4.quantize(x, scales="search")), errors(weighted)
    assert (after <= before * (1 + 1e-6) + 1e-13 * (x.double() ** 2 * energy).view(-1, 16).sum(-1).numpy()).all()
    assert after.sum() < 0.9 * plain.sum()


def test_column_weights_count_by_their_ratios_in_a_block() -> None:
    x, energy = sample("student", 16, 96), energies("dead", 96)
    q = nvfp4.quantize(x, scales="search", column_weights=energy)
    assert_same(nvfp4.quantize(x, scales="search", column_weights=energy.double() * 2.0**200), q)
    energy[32:48] = 7
    assert_same(nvfp4.quantize(x, scales="search", column_weights=energy), q)
    plain = nvfp4.quantize(x, scales="search")
    assert_same(nvfp4.quantize(x, scales="search", column_weights=torch.full((96,), 0.3)), plain)
    assert_same(nvfp4.quantize(x, scales="search", column_weights=torch.zeros(96)), plain)
    assert np.array_equal(bytes_of(q.block_scales)[:, 1:3], bytes_of(plain.block_scales)[:, 1:3])
    assert not np.array_equal(bytes_of(q.block_scales), bytes_of(plain.block_scales))


def test_column_weights_are_checked() -> None:
    x = sample("gaussian", 2, 32)
    with pytest.raises(ValueError, match="scales='search', got scales='absmax'"):
        nvfp4.quantize(x, column_weights=torch.ones(32))
    for bad in (torch.ones(16), torch.ones(1, 32), -torch.ones(32), torch.full((32,), math.nan), torch.ones(32) / 0):
        with pytest.raises(ValueError, match=r"must be \[32\], finite and >= 0"):
            nvfp4.quantize(x, scales="search", column_weights=bad)


def search_error(magnitude: np.ndarray, weights: np.ndarray, code: int, g: np.float32) -> np.float32:
    scale = F32(E4M3[code])
    value = E2M1[nearest(E2M1, magnitude * (F32(1) / (scale * (F32(1) / g))))].astype(F32)
    difference = value * scale - magnitude * g
    terms = difference * difference * weights
    for half in (8, 4, 2, 1):
        terms = terms[:half] + terms[half:]
    return terms[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_search_equals_its_stated_order_of_summation(weighted: bool) -> None:
    """NumPy FP32, one operation at a time."""
    x, energy = sample("student", 8, 64), energies("spread", 64) if weighted else torch.ones(64)
    q = nvfp4.quantize(x, scales="search", tensor_scale=0.01, column_weights=energy if weighted else None)
    ratios = energy.double().view(-1, 16).numpy()
    ratios = (ratios / ratios.max(-1, keepdims=True)).astype(F32)
    g = F32(1) / F32(0.01)
    _, absmax = reference(x, 0.01)
    for row, block in np.ndindex(absmax.shape):
        magnitude, weights = np.abs(x[row].view(-1, 16)[block].numpy()), ratios[block]
        best = first = int(absmax[row, block])
        for offset in (-2, -1, 1, 2, 3, 4, 5, 6):
            code = min(max(first + offset, 0), 126)
            bar = search_error(magnitude, weights, best, g) * F32(1 - 2.0**-14)
            best = code if search_error(magnitude, weights, code, g) < bar else best
        assert bytes_of(q.block_scales)[row, block] == best


# ---- activations ----


def tokens(m: int = 41, k: int = 208) -> torch.Tensor:
    """Rows of very different magnitude, with outliers, zero blocks and a zero row."""
    x = sample("gaussian", m, k) * torch.exp2(torch.linspace(-100, 110, m))[:, None]
    x[::3, 5] *= 1000
    x[:, 32:48] = 0
    x[4] = 0
    return x.bfloat16()


def test_activations_equal_the_reference_on_rescaled_rows() -> None:
    x = tokens()
    q = nvfp4.quantize_activations(x)
    assert q.packed.shape == (41, 104) and q.block_scales.shape == (41, 13) and q.row_scales.shape == (41,)
    for i, scale in enumerate(q.row_scales.tolist()):
        codes, scales = reference((x[i : i + 1].double() / scale).float(), 1.0)
        np.testing.assert_array_equal(codes_of(q.packed[i : i + 1]), codes)
        np.testing.assert_array_equal(bytes_of(q.block_scales[i : i + 1]), scales)
        expected = values_of(codes, scales)[0] * scale
        np.testing.assert_array_equal(q.dequantize()[i].double().numpy(), expected)  # exact in BF16
    finite = x.abs().amax(-1) > 0
    error = (q.dequantize().double() - x.double())[finite].norm(dim=-1) / x.double()[finite].norm(dim=-1)
    assert error.max() < 0.13


@pytest.mark.parametrize("mantissa", [1.0, 1.3125, 1.3203125, 1.9921875])
def test_row_scale_is_the_least_power_of_two_that_fits(mantissa: float) -> None:
    for exponent in (-110, -20, -1, 0, 1, 12, 127):
        amax = mantissa * 2.0**exponent
        x = torch.zeros(1, 16, dtype=torch.bfloat16)
        x[0, 3] = -amax
        scale = nvfp4.row_scales(x).item()
        assert math.frexp(scale)[0] == 0.5
        assert amax <= 2688 * scale and amax > 2688 * scale / 2


def test_row_scale_stays_a_normal_float() -> None:
    x = torch.tensor([[2.0**-133] * 16, [2.0**-120] * 16], dtype=torch.bfloat16)
    q = nvfp4.quantize_activations(x)
    assert q.row_scales.tolist() == [2.0**-126, 2.0**-126] and q.dequantize().isfinite().all()
    q = nvfp4.quantize_activations(torch.zeros(2, 16, dtype=torch.bfloat16))
    assert q.row_scales.tolist() == [1, 1] and not q.packed.any() and not bytes_of(q.block_scales).any()
    assert not q.dequantize().any()


@pytest.mark.parametrize("m", [0, 1, 3, 129])
def test_a_row_does_not_depend_on_its_neighbours(m: int) -> None:
    x = tokens(m, 64) if m > 4 else sample("gaussian", m, 64).bfloat16()
    q = nvfp4.quantize_activations(x)
    assert q.dequantize().shape == (m, 64) and q.dequantize().dtype == torch.bfloat16
    for i in range(m):
        alone = nvfp4.quantize_activations(x[i : i + 1])
        assert torch.equal(alone.packed[0], q.packed[i]) and alone.row_scales[0] == q.row_scales[i]
        assert torch.equal(alone.dequantize()[0], q.dequantize()[i])


def test_scaling_a_row_by_a_power_of_two_scales_its_values() -> None:
    x = sample("student", 16, 128).bfloat16()
    small, large = nvfp4.quantize_activations(x), nvfp4.quantize_activations(x * 1024)
    assert torch.equal(large.dequantize(), small.dequantize() * 1024)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_infinity_is_nan_and_harms_no_other(bad: float) -> None:
    x = sample("gaussian", 5, 32).bfloat16()
    clean = nvfp4.quantize_activations(x).dequantize()
    x[2, 17] = bad
    got = nvfp4.quantize_activations(x).dequantize()
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_activations_never_ask_the_device_for_a_value() -> None:
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")  # has no values: .item() and the like raise
    assert nvfp4.quantize_activations(x).dequantize().shape == (3, 64)


# ---- other implementations (kernels.md, section 1, lists where they differ) ----


def test_packing_equals_compressed_tensors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
        quantization = pytest.importorskip("compressed_tensors.quantization")
        forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    x = sample("gaussian", 48, 256)
    q = nvfp4.quantize(x)
    e2m1 = helpers.unpack_fp4_from_uint8(q.packed, 48, 256, dtype=torch.float32)
    np.testing.assert_array_equal(e2m1.numpy(), values_of(codes_of(q.packed), np.full((48, 16), 0x38)))
    assert torch.equal(helpers.pack_fp4_to_uint8(e2m1), q.packed)
    # with our scales it divides once by scale/global, where we multiply by a rounded reciprocal
    theirs = forward.quantize(
        x=x,
        scale=q.block_scales.float(),
        global_scale=q.tensor_scale.reciprocal().reshape(1),
        zero_point=None,
        args=quantization.QuantizationArgs(num_bits=4, type="float", group_size=16),
    )
    assert np.mean(codes_of(helpers.pack_fp4_to_uint8(theirs)) != codes_of(q.packed)) < 1e-3


def test_values_and_layout_equal_torchao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
        to_blocked = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
    x = sample("gaussian", 130, 320)
    q = nvfp4.quantize(x)
    scales, packed = torchao.nvfp4_quantize(x, per_tensor_scale=q.tensor_scale)
    same = bytes_of(q.block_scales) == bytes_of(scales)
    assert same.mean() > 0.999  # it divides where we multiply by reciprocals
    differ = (codes_of(q.packed) != codes_of(packed)).reshape(130, -1, 16)[same]
    assert differ.mean() < 1e-3
    blocked = to_blocked(q.block_scales.view(torch.uint8))
    assert torch.equal(blocked.flatten(), q.swizzled_scales().view(torch.uint8).flatten())
