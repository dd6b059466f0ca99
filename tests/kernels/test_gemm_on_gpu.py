"""The FP8 GEMMs on a GPU: each against float64 of the same codes, against each other, in a graph; and their tuning."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixquant_sglang.kernels.tuning import fp8_cache, fp8_gemm
from mixquant_sglang.kernels.tuning.fp8_gemm import CANDIDATES, Cell, GemmTable

pytestmark = pytest.mark.gpu

QWEN3_8B = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]
ROWS = [512, 1024, 2048, 4096, 8192, 16384]
TOLERANCE = 4e-3  # BF16 rounding of the output is 1.7e-3; the rest is FP8 accumulation


@pytest.fixture(autouse=True)
def no_table() -> Iterator[None]:
    yield
    fp8_gemm.use(GemmTable({}))


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    seed = torch.Generator("cuda").manual_seed(m + n + k)

    def codes(rows: int) -> torch.Tensor:
        return (torch.randn(rows, k, device="cuda", generator=seed) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)

    xq, wq = codes(m), codes(n)
    wq[n // 3] = torch.zeros(k, device="cuda").to(torch.float8_e4m3fn)
    if m > 1:
        xq[m // 2] = torch.zeros(k, device="cuda").to(torch.float8_e4m3fn)
    # Scales of rows that are neighbours differ by orders of magnitude: one that is off by a row shows at once.
    sx = 10.0 ** (torch.rand(m, 1, device="cuda", generator=seed) * 6 - 5)
    sw = 10.0 ** (torch.rand(n, device="cuda", generator=seed) * 3 - 4)
    return xq, wq, sx, sw


def unscaled_errors(out: torch.Tensor, other: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, k: int) -> torch.Tensor:
    """|out - other| [M, N] in units of a typical sum's size, so that no row or column hides behind a larger one."""
    return (out.double() - other.double()).abs() / (sx.double() * sw.double() * 64 * 64 * k**0.5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (17, 6144, 4096), (1000, 4096, 12288), (257, 48, 80), (1000, 24576, 4096)]
)
def test_candidates_against_float64_of_the_same_codes(m: int, n: int, k: int, with_bias: bool) -> None:
    xq, wq, sx, sw = operands(m, n, k)
    reference = xq.double() @ wq.double().t() * sx.double() * sw.double()
    bias = None
    if with_bias:  # of the size of what it is added to in a middling row
        bias = (torch.randn(n, device="cuda") * reference.abs().median(dim=0).values).bfloat16()
        reference += bias.double()
    rounding = reference.abs() * 2**-8 / (sx.double() * sw.double() * 64 * 64 * k**0.5)
    outs = {}
    for name, run in CANDIDATES.items():
        poison = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device="cuda")
        del poison  # so that the output most likely starts as NaN
        out = outs[name] = run(xq, wq, sx, sw, bias)
        assert out.shape == (m, n) and out.dtype == torch.bfloat16 and out.is_contiguous()
        error = float((out.double() - reference).norm() / reference.norm())
        worst = float((unscaled_errors(out, reference, sx, sw, k) - rounding).max())
        print(f"{name} [{m}, {n}, {k}]: relative error {error:.2e}, worst element beyond BF16's rounding {worst:.2e}")
        assert error < TOLERANCE
        assert worst < 0.1  # a wrong scale or a lost block of K is of order 1
        if bias is None:
            assert not out[:, n // 3].any() and (m == 1 or not out[m // 2].any())
    first = outs.pop("cutlass")
    for name, out in outs.items():
        difference = float((out.double() - first.double()).norm() / reference.norm())
        print(f"{name} against cutlass: {difference:.2e}")
        assert difference < TOLERANCE


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("m", [17, 1000])
def test_a_row_does_not_depend_on_the_others(name: str, m: int) -> None:
    xq, wq, sx, sw = operands(m, 6144, 4096)
    before = CANDIDATES[name](xq, wq, sx, sw, None)
    row = m // 3
    others = torch.arange(m, device="cuda") != row
    xq.view(torch.uint8)[others] = xq.view(torch.uint8)[others].flip(1)
    sx[others] *= 1e3
    assert torch.equal(CANDIDATES[name](xq, wq, sx, sw, None)[row], before[row])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", CANDIDATES)
def test_in_a_cuda_graph(name: str, with_bias: bool) -> None:
    m, n, k = 130, 4096, 4096
    others = {other: 9.0 for other in CANDIDATES if other != name}
    fp8_gemm.use(GemmTable({(n, k, 256): Cell({name: 1.0, **others}, {})}))
    xq, wq, sx, sw = operands(m, n, k)
    bias = torch.randn(n, dtype=torch.bfloat16, device="cuda") if with_bias else None
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        fp8_gemm.scaled_mm(xq, wq, sx, sw, bias)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8_gemm.scaled_mm(xq, wq, sx, sw, bias)
    xq.view(torch.uint8).copy_(xq.view(torch.uint8).flip(0))  # flip copies
    sx.mul_(3)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, CANDIDATES[name](xq, wq, sx, sw, bias))


def test_tuning_real_shapes_takes_a_second_and_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MIXQUANT_CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO, logger=fp8_cache.logger.name)
    import sgl_kernel  # noqa: F401  SGLang has imported it long before it loads a model

    numbers, held = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    table = fp8_cache.load_or_tune(QWEN3_8B, ROWS, torch.device("cuda"), {"sgl_kernel": "test"})
    took = time.monotonic() - begin
    peak = torch.cuda.max_memory_allocated() - held
    print(f"{table}\ntook {took:.2f} s, at most {peak / 2**20:.0f} MiB")
    assert took < 3
    assert torch.equal(torch.cuda.get_rng_state(), numbers)
    assert torch.cuda.memory_allocated() - held < 40 * 2**20  # cuBLAS may keep its workspace; no operand is that small
    assert peak < 1.6 * 2**30  # operands and output of gate_up with 16384 rows are 0.97 GiB, 0.25 are to empty the L2
    assert set(table.cells) == {(n, k, m) for n, k in QWEN3_8B for m in ROWS}
    for n, k in QWEN3_8B:
        assert all(table.pick(n, k, m) in CANDIDATES for m in (1, 700, 16384, 99999))
        least = 2 * n * k * 16384 / 1e16 * 1e3  # no GPU of today does 10 PFLOP/s in dense FP8
        assert all(ms > least for ms in table.cells[n, k, 16384].ms.values())
    begin = time.monotonic()
    again = fp8_cache.load_or_tune(QWEN3_8B, ROWS, torch.device("cuda"), {"sgl_kernel": "test"})
    assert again.cells == table.cells and time.monotonic() - begin < 0.5
    assert sum("(cached)" in record.getMessage() for record in caplog.records) == len(QWEN3_8B)
