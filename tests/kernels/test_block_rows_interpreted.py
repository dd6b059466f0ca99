"""FP8 weights in blocks and BF16 rows in Triton's interpreter: the numbers of plain torch, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.test_experts_interpreted import DOT
from tests.kernels.test_triton_compiles import PREPARE

pytestmark = [pytest.mark.slow, pytest.mark.once]

ROOT = Path(__file__).resolve().parents[2]

ROWS = """
from mixquant_sglang.formats.fp8_blocks import FP8Blocks, blocks_of
from mixquant_sglang.kernels.triton.block_rows import block_rows


def weight(n, k):
    # each block's scale is another one, so a wrong one shows
    codes = (torch.randn(n, k) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)
    count = blocks_of(n) * blocks_of(k)
    scales = torch.exp2(torch.randperm(count).float() - count / 2).view(blocks_of(n), blocks_of(k))
    return FP8Blocks(codes, scales * 1.5)


def near(got, x, w, bias):
    values = w.data.double() * w.scales.double().repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[
        :, : w.shape[1]
    ]
    want = x.double() @ values.t() + (0 if bias is None else bias.double())
    may = want.abs() * 2**-8 + 2**-20 * (x.double().abs() @ values.abs().t()) + 2**-40
    assert got.dtype is torch.bfloat16 and bool(((got.double() - want).abs() <= may).all())


for m, n, k in ((1, 32, 128), (3, 200, 304), (17, 136, 256), (70, 40, 16)):
    w, x, bias = weight(n, k), torch.randn(m, k).bfloat16(), torch.randn(n).bfloat16()
    for b in (None, bias):
        near(block_rows(x, w.data, w.scales, b), x, w, b)
    many = block_rows(torch.cat((x[:1], x * 99)), w.data, w.scales)
    assert torch.equal(block_rows(x[:1], w.data, w.scales), many[:1])

# in the places of rows, q apart from the rest
w, x = weight(192, 256), torch.randn(16, 256).bfloat16()
index = torch.full((16,), -1)
index[:3] = torch.tensor([5, 0, 7])
out, rest = torch.full((9, 64), 7.0).bfloat16(), torch.full((9, 128), 7.0).bfloat16()
block_rows(x, w.data, w.scales, out=out, index=index, rest=rest)
want = block_rows(x, w.data, w.scales)[:3]
assert torch.equal(torch.cat((out, rest), 1)[index[:3]], want)
others = [1, 2, 3, 4, 6, 8]
assert (out[others] == 7).all() and (rest[others] == 7).all()
"""


def test_interpreted_rows_equal_torch() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\nsys.path.append({str(ROOT)!r})\n"
            + PREPARE.replace("import torch\n", "import torch\nimport triton\n", 1)
            + DOT
            + ROWS,
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
