"""Grouped products and experts of few rows in Triton's interpreter: the numbers of plain torch, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.test_triton_compiles import PREPARE

pytestmark = [pytest.mark.slow, pytest.mark.once]

ROOT = Path(__file__).resolve().parents[2]  # of ``tests``, behind the installed package

DOT = """
import numpy as np
from mixquant_sglang.kernels.experts.base import Form
from tests.support.experts import OAI, error, masters, reference, routed


def values(handle):
    # the interpreter keeps BF16 as the bits, and would multiply these
    bits = handle.data
    return (bits.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else bits


def dot(self, a, b, total, *rest):
    product = np.matmul(values(a), values(b), dtype=np.float32) + total.data
    return interpreter.TensorHandle(product, total.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = dot
FORMS = (Form(), Form("gelu", scaling=2.5), OAI, Form(weighted_input=True))
"""

FEW_ROWS = """
from mixquant_sglang.kernels.triton.expert_rows import expert_rows_

SIZES = [(6, 48, 80, 2), (3, 64, 128, 1), (4, 32, 64, 3)]
for form, (experts, i, h, k), used in itertools.product(FORMS, SIZES, (0, 1, 20)):
    of = masters(experts, i, h, bias=form is OAI)
    x, weights, ids = routed(40, experts, h, k)
    ids[3, 0] = ids[7] = -1
    index = torch.full((used + 3,), -1)
    index[:used] = torch.tensor([3, 7, *range(39, 20, -1)])[:used]
    out = torch.full((40, h), 7.0).bfloat16()
    expert_rows_(out, index, x, weights, ids, of, form)
    rows = index[:used]
    others = [t for t in range(40) if t not in rows.tolist()]
    assert (out[others] == 7).all()
    if used:
        want = reference(x[rows], weights[rows], ids[rows], of, form)
        assert error(out[rows], want) < 0.01, (form, used)
# more than 16 pairs of one expert
x, weights, ids = routed(40, 2, 64, 2)
of, out = masters(2, 32, 64), torch.zeros(40, 64).bfloat16()
expert_rows_(out, torch.arange(40), x, weights, ids, of, Form())
assert error(out, reference(x, weights, ids, of, Form())) < 0.01
"""

PACKED_ROWS = """
from mixquant_sglang.kernels.experts.emulated import EmulatedFP8Experts, EmulatedNVFP4Experts
from mixquant_sglang.kernels.experts.weight_only import NativeW4A16Experts, NativeW8A16Experts
from mixquant_sglang.kernels.triton.expert_rows import matrix_rows_
from mixquant_sglang.kernels.triton.expert_warps import warp_rows_
from tests.support.experts import held

KINDS = {"fp8": (EmulatedFP8Experts, NativeW8A16Experts), "nvfp4": (EmulatedNVFP4Experts, NativeW4A16Experts)}


def place(reader, run, index, x, weights, ids):
    out = torch.full(x.shape, 7.0).bfloat16()
    run(out, index, x, weights, ids, reader._matrix(0), reader._matrix(1), reader._form)
    return out


SIZES = [(6, 64, 96, 2), (3, 32, 64, 1)]
for (precision, (packs, reads)), form, (experts, i, h, k) in itertools.product(KINDS.items(), FORMS, SIZES):
    of = masters(experts, i, h, bias=form is OAI)
    of.w13[1, 3], of.w2[0] = 0, 0  # zero blocks
    reader = reads.of(packs(of, form, scales="search"))
    x, weights, ids = routed(12, experts, h, k)
    ids[3, 0] = ids[7] = -1
    index = torch.tensor([3, 7, 11, 2, -1, -1])
    rows = index[:4]
    want = reference(x, weights, ids, held(of, precision, form), form)[rows]
    # torch's numbers, up to the order of sums; and no row depends on another
    cpu = reader.run(x, weights, ids)
    for run in (matrix_rows_, warp_rows_):
        out = place(reader, run, index, x, weights, ids)
        others = [t for t in range(12) if t not in index.tolist()]
        assert (out[others] == 7).all()
        assert error(out[rows], want) < 0.006, (precision, form, run, error(out[rows], want))
        assert error(out[rows], cpu[rows]) < 0.004
        same(place(reader, run, rows[2:3], x, weights, ids)[11], out[11])
        assert (place(reader, run, torch.tensor([-1, -1]), x, weights, ids) == 7).all()
    together = reader._by_pieces(x, weights, ids)
    assert error(together, cpu) < 0.004
    # more pairs of an expert than a unit has, and of ids of other ranks
    if experts == 3:
        index = torch.tensor([11, *range(11), -1])
        out = place(reader, warp_rows_, index, x, weights, ids)
        same(out[rows], together[rows])
        same(out, together)
"""

GROUPED = """
from mixquant_sglang.kernels.triton.grouped import grouped_matmul


def sort(ids, block):
    # as sgl_kernel.moe_align_block_size
    order, experts = [], []
    for e in range(-1, int(ids.max()) + 1):
        found = (ids.flatten() == e).nonzero().flatten().tolist()
        for begin in range(0, len(found), block):
            part = found[begin : begin + block]
            order += part + [ids.numel()] * (block - len(part))
            experts.append(e)
    unused = [ids.numel()] * block  # the buffers are larger than what is used
    return tuple(torch.tensor(t, dtype=torch.int32) for t in (order + unused, experts + [0], [len(order)]))


def product(x, x_scales, weight, scales, bias, route_weights, routing, share, form, tile, halves, out):
    experts, n, k = weight.shape
    columns = out.shape[1]
    grid = (len(routing[1]) * triton.cdiv(columns, tile[1]),)
    grouped_matmul[grid](
        x, weight, out, x_scales, scales, bias, route_weights, *routing, len(out), form.alpha if form else 1.0,
        form.limit if form else 0.0, N=n, K=k, SHARE=share, ACT=form.activation if form else "", TMA=False,
        BM=tile[0], BN=tile[1], BK=tile[2], GROUP=2, HALVES=halves,
    )
    return out


for form, (experts, i, h, k), block in itertools.product(FORMS, [(6, 48, 80, 2), (3, 64, 128, 1)], (16, 32)):
    of = masters(experts, i, h, bias=form is OAI)
    w13 = torch.cat((of.w13[:, 0::2], of.w13[:, 1::2]), 1).contiguous() if form.interleaved else of.w13
    bias13 = of.bias13
    if form.interleaved:
        bias13 = torch.cat((bias13[:, 0::2], bias13[:, 1::2]), 1).contiguous()
    x, weights, ids = routed(37, experts, h, k)
    ids[3, 0] = ids[7] = -1
    ones = [torch.ones(experts, n) for n in (2 * i, h)]
    x_scales = torch.rand(37) + 0.5  # a power of nothing: applied to the sum
    results = []
    for halves in (False, True):
        routing = sort(ids, block)
        hidden = torch.full((ids.numel(), i), 7.0).bfloat16()
        product(x, x_scales, w13, ones[0], bias13, weights if form.weighted_input else None, routing, k, form,
                (block, 32, 16), halves, hidden)
        parts = torch.full((ids.numel(), h), 7.0).bfloat16()
        product(hidden, None, of.w2, ones[1], of.bias2, None if form.weighted_input else weights, routing, 1, None,
                (block, 64, 16), halves, parts)
        assert (parts[ids.flatten() < 0] == 0).all()
        results.append(parts)
    same(*results)
    out = results[0].view(37, k, h).float().sum(1) * form.scaling
    scaled = (x.double() * x_scales[:, None].double())
    assert error(out, reference(scaled, weights, ids, of, form)) < 0.02, form

# FP8 weights are widened for BF16 rows
of = masters(3, 32, 64, scale=1.0)
x, weights, ids = routed(9, 3, 64, 2)
codes = of.w13.to(torch.float8_e4m3fn)
out = torch.zeros(18, 32).bfloat16()
product(x, None, codes, torch.ones(3, 64), None, None, sort(ids, 16), 2, Form(), (16, 32, 32), False, out)
want = torch.zeros(18, 32).bfloat16()
product(x, None, codes.bfloat16(), torch.ones(3, 64), None, None, sort(ids, 16), 2, Form(), (16, 32, 32), False, want)
same(out, want)
"""


@pytest.mark.parametrize("script", [FEW_ROWS, PACKED_ROWS, GROUPED], ids=["few_rows", "packed_rows", "grouped"])
def test_interpreted_experts_equal_torch(script: str) -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\nsys.path.append({str(ROOT)!r})\n"
            + PREPARE.replace("import torch\n", "import torch\nimport triton\n", 1)
            + DOT
            + script,
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
