"""Our Triton kernels without a GPU: they compile for every architecture, and interpreted give the right numbers."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mixquant_sglang.kernels.triton import nvfp4, rows  # noqa: E402

# kernel, types of its arguments, constants: what the launches in the package pass
CASES: dict[str, tuple[Any, dict[str, str], dict[str, int], int]] = {
    "qdq_rows_4096": (nvfp4._qdq_rows, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"K": 4096, "BLOCKS": 256}, 4),
    "qdq_rows_48": (nvfp4._qdq_rows, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"K": 48, "BLOCKS": 4}, 1),
    "qdq_wide_rows": (nvfp4._qdq_rows, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"K": 11008, "BLOCKS": 256}, 8),
    "unpack_weights": (
        nvfp4._unpack_weights,
        {"packed_ptr": "*u8", "scale_ptr": "*u8", "out_ptr": "*i32", "blocks": "i32"},
        {"BLOCKS": 256},
        4,
    ),
    "gather": (
        rows._gather,
        {"x_ptr": "*bf16", "index_ptr": "*i64", "out_ptr": "*bf16", "columns": "i32", "x_stride": "i32"},
        {"COLUMNS": 2048},
        4,
    ),
    "scatter": (
        rows._scatter,
        {
            "out_ptr": "*bf16",
            "rows_ptr": "*bf16",
            "index_ptr": "*i32",
            "columns": "i32",
            "out_stride": "i32",
            "rows_stride": "i32",
        },
        {"COLUMNS": 2048},
        4,
    ),
    "scale": (
        rows._scale,
        {"out_ptr": "*bf16", "scale_ptr": "*fp32", "columns": "i32", "out_stride": "i32"},
        {"COLUMNS": 2048},
        4,
    ),
}


HELPERS = {"_round_to_steps", "_load_blocks", "_store_blocks"}


def test_every_kernel_is_in_the_table() -> None:
    kernels = {
        name
        for module in (nvfp4, rows)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name not in HELPERS
    }
    assert {kernel.fn.__name__ for kernel, *_ in CASES.values()} == kernels


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("case", CASES)
def test_compiles(case: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments, constants, warps = CASES[case]
    source = ASTSource(
        fn=kernel,
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 1000
    ptx = compiled.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert "fma." not in ptx and ".ftz" not in ptx and "div.full" not in ptx  # each would change the numbers
    if case.startswith("qdq"):
        assert "div.rn.f32" in ptx


INTERPRETED = """
import torch
from mixquant_sglang.formats import nvfp4 as reference
from mixquant_sglang.kernels.triton import nvfp4, rows

torch.manual_seed(0)


def same(got, want):
    assert torch.equal(got.isnan(), want.isnan()) and got.dtype == want.dtype
    real = ~want.isnan()
    assert torch.equal(got.view(torch.int16)[real], want.view(torch.int16)[real]), (got, want)


for m, k in ((0, 16), (1, 16), (9, 48), (5, 208), (2, 4096), (5, 11008)):
    x = torch.randn(m, k) * torch.exp2(torch.linspace(-100, 120, m))[:, None]
    x[:, 3] *= 50
    x[::2, :16] = -0.0
    x[3:4] = 0
    x[4:5, 7] = float("inf")
    x[5:6, 7] = float("nan")
    x = x.bfloat16()
    same(nvfp4.qdq_activations(x), reference.quantize_activations(x).dequantize())

for n, k in ((1, 16), (33, 48), (7, 1040)):
    x = torch.randn(n, k) * torch.exp2(torch.randint(-20, 6, (n, k // 16)).float()).repeat_interleave(16, 1)
    w = reference.quantize(x)
    out = torch.full((n, k), float("nan"), dtype=torch.bfloat16)
    assert nvfp4.unscaled(w.packed, w.block_scales, out) is out
    same(out, w.unscaled())
everything = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
scales = torch.arange(127, dtype=torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
same(nvfp4.unscaled(everything, scales), reference.NVFP4Tensor(everything, scales, torch.tensor(1.0)).unscaled())

x = torch.randn(7, 2500).bfloat16()
for dtype in (torch.int32, torch.int64):
    index = torch.tensor([3, -1, 6, -1, 0], dtype=dtype)
    got = rows.gather_rows(x, index)
    same(got, torch.where(index[:, None] < 0, torch.zeros_like(got), x[index.clamp(min=0).long()]))
    out = x.clone()
    rows.scatter_rows_(out, -got, index)
    same(out, x * torch.tensor([-1, 1, 1, -1, 1, 1, -1], dtype=torch.bfloat16)[:, None])
scales = torch.tensor([1, 2, 0.5, 2.0**100, 2.0**-100, 0, float("nan")])
out = x.clone()
rows.scale_rows_(out, scales)
same(out, (x.float() * scales[:, None]).bfloat16())
"""


def test_interpreted_kernels_equal_torch() -> None:
    """In a process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined. The interpreter truncates
    to bfloat16 and gets its subnormals wrong: inexact and subnormal results are left to the tests on a GPU."""
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
