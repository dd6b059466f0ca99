"""The GEMM of deterministic inference, interpreted: the numbers of FP64, and of a row the same bits in any company."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mixquant_sglang.formats import nvfp4  # noqa: E402
from mixquant_sglang.kernels.environment import NOTHING, Environment  # noqa: E402
from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8  # noqa: E402
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4  # noqa: E402
from mixquant_sglang.kernels.linear.native_fp8 import NativeFP8  # noqa: E402
from mixquant_sglang.kernels.triton import invariant  # noqa: E402
from mixquant_sglang.kernels.tuning import fp8_gemm  # noqa: E402
from tests.kernels.test_triton_compiles import PREPARE, invariant_case  # noqa: E402
from tests.kernels.test_warm_up import Recorder  # noqa: E402

INVARIANT = Environment(invariant=True)

ROWS = """
import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.kernels.linear.native_fp8 import NativeFP8
from mixquant_sglang.kernels.triton import invariant


def values(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return torch.from_numpy(handle.data.copy()).view(torch.float8_e4m3fn).double().numpy()


def dot(self, a, b, total, *_):  # a tile's products in FP64, which holds them exactly: no order of NumPy's own
    product = np.matmul(values(a), values(b))
    return TensorHandle((product + total.data).astype(np.float32), total.dtype.scalar)


InterpreterBuilder.create_dot = dot
MOST = 2 * invariant.TILE[0] + 45
for (n, k), codes in itertools.product([(96, 64), (200, 48), (16, 16), (130, 272)], ["fp8", "bf16"]):
    weight, x = fp8.quantize(torch.randn(n, k).bfloat16()), fp8.quantize_activations(torch.randn(MOST, k).bfloat16())
    xq, wq, sx, sw, bias = x.data, weight.data, x.scales[:, None], weight.scales, torch.randn(n).bfloat16()
    if codes == "bf16":  # as the emulated kernels have them: no scale of rows, one of the weight
        xq, wq, sx, sw, bias = xq.bfloat16(), wq.bfloat16(), None, torch.tensor(0.37).expand(n), None
    out = torch.full((MOST, n + 9), 7.0).bfloat16()
    got = invariant.scaled_mm(xq, wq, sx, sw, bias, out=out[:, 3 : n + 3])
    assert got.data_ptr() == out[:, 3:].data_ptr()
    assert (out[:, :3] == 7).all() and (out[:, n + 3 :] == 7).all()
    sums = xq.double() @ wq.double().t()
    size = (xq.double().abs() @ wq.double().abs().t()) * 2.0**-22
    factor = sw.double()[None] * (1 if sx is None else sx.double())
    want = sums * factor + (0 if bias is None else bias.double())
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + size * factor).all(), (n, k, codes)

    def rows(index):
        return invariant.scaled_mm(xq[index].contiguous(), wq, None if sx is None else sx[index].contiguous(), sw, bias)

    for row in (0, 1, 127, 128, MOST - 1):
        same(rows(torch.tensor([row])), got[row : row + 1])
    for count in (2, 15, 127, 129, 256):
        index = torch.randperm(MOST)[:count]
        same(rows(index), got[index])
        same(rows(index[:1].expand(count)), got[index[:1].expand(count)])
assert invariant.scaled_mm(xq[:0], wq, None, sw).shape == (0, n)

weight, x = torch.randn(80, 96).bfloat16(), torch.randn(70, 96).bfloat16()
packed = NativeFP8(weight, environment=Environment(invariant=True))
whole = packed.matmul(x, None)
same(packed.matmul(x[41:42].contiguous(), None), whole[41:42])
same(packed.columns(64, 80).matmul(x, None), whole[:, 64:])
"""


@pytest.mark.once
@pytest.mark.slow
def test_a_row_has_the_same_bits_in_any_company() -> None:
    """In a process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined."""
    run = subprocess.run(
        [sys.executable, "-c", PREPARE + ROWS],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("dtype", invariant.DEPTH)
def test_one_kernel_for_every_number_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything compiled by it while serving: the warm-up runs one number."""
    keys: set[str] = set()
    monkeypatch.setattr(invariant, "_scaled_matmul", Recorder(invariant._scaled_matmul, keys))
    monkeypatch.setattr(invariant, "_stages", lambda device: 3)
    wq, sw = torch.zeros(64, 48).to(dtype), torch.ones(64)
    for m in (1, 2, 16, 17, 128, 1000, 4096):
        invariant.scaled_mm(torch.zeros(m, 48).to(dtype), wq, torch.ones(m, 1), sw)
    assert len(keys) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "most"), [((9, 0), 232448), ((10, 0), 232448), ((8, 9), 101376), ((12, 0), 101376)]
)
def test_a_tile_fits_into_shared_memory(
    capability: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariant, "capability", lambda device: capability)
    stages = invariant._stages.__wrapped__(torch.device("cuda"))
    for codes in ("fp8e4nv", "bf16"):
        kernel, types, constants, warps = invariant_case(codes, scaled=codes != "bf16", bias=True, whole=True)
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature=types | dict.fromkeys(constants, "constexpr"),
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={
                (names.index(name),): [["tt.divisibility", 16]]
                for name in types
                if name not in ("rows", "scale_stride")
            },
        )
        target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
        assert 2**15 * (stages - 1) <= compiled.metadata.shared <= most, codes


def test_refusals() -> None:
    codes, ones = torch.zeros(4, 32).to(torch.float8_e4m3fn), torch.ones(4)
    for call in (
        lambda: invariant.scaled_mm(codes.float(), codes.float(), None, ones),
        lambda: invariant.scaled_mm(codes.bfloat16(), codes, None, ones),
        lambda: invariant.scaled_mm(codes[:, :24].contiguous(), codes[:, :24].contiguous(), None, ones),
        lambda: invariant.scaled_mm(codes[:, :16], codes[:, :16], None, ones),
        lambda: invariant.scaled_mm(codes, codes, ones, ones),
        lambda: invariant.scaled_mm(codes, codes, None, ones.double()),
        lambda: invariant.scaled_mm(codes, codes, None, ones, bias=ones),
        lambda: invariant.scaled_mm(codes, codes, None, ones, out=ones.bfloat16()),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()


class _OnGpu(torch.Tensor):
    """A tensor of this machine that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def on_gpu(tensor: torch.Tensor) -> Any:
    return tensor.as_subclass(_OnGpu)


@pytest.mark.parametrize("kernel", [NativeFP8, EmulatedFP8, EmulatedNVFP4])
def test_who_takes_it(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each low-precision linear, where rows must not depend on their number, and none elsewhere."""
    seen: list[tuple[int, ...]] = []

    def scaled_mm(xq: Any, wq: Any, sx: Any, sw: Any, bias: Any = None, out: Any = None) -> torch.Tensor:
        seen.append(tuple(xq.shape))
        product = xq.float() @ wq.float().t() * sw[None] * (1 if sx is None else sx) + (0 if bias is None else bias)
        return product.bfloat16() if out is None else out.copy_(product)

    monkeypatch.setattr(invariant, "scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8_gemm, "scaled_mm", lambda *operands: (_ for _ in ()).throw(RuntimeError("tuned")))
    monkeypatch.setattr(
        "mixquant_sglang.kernels.triton.unpack.unscaled",
        lambda packed, scales: nvfp4.NVFP4Tensor(packed, scales, torch.ones(())).unscaled(),
    )
    torch.manual_seed(0)
    weight, x, bias = torch.randn(48, 32).bfloat16(), torch.randn(5, 32).bfloat16(), torch.randn(48).bfloat16()
    packed = kernel(weight, environment=INVARIANT)
    if kernel is EmulatedNVFP4:
        got = packed.multiply((on_gpu(nvfp4.quantize_activations(x).dequantize()),), bias)
    else:
        got = packed.matmul(x if kernel is NativeFP8 else on_gpu(x), bias)
    assert seen == [(5, 32)]
    emulated = EmulatedNVFP4 if kernel is EmulatedNVFP4 else EmulatedFP8
    torch.testing.assert_close(got.as_subclass(torch.Tensor), emulated(weight).matmul(x, bias), rtol=2**-6, atol=2**-6)
    seen.clear()
    plain = kernel(weight, environment=NOTHING)
    if kernel is NativeFP8:
        with pytest.raises(RuntimeError, match="tuned"):
            plain.matmul(x, None)
    assert not seen
