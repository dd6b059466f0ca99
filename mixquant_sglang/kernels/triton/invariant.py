"""The GEMM of low-precision rows under deterministic inference: one, whatever the number of rows.

    y[m, n] = sx[m] * sw[n] * sum_k xq[m, k] wq[n, k] (+ bias[n])

Libraries choose tiles, split K or take another kernel by M, so that the last bits of a row change with its company.
Here tiles depend on the dtype alone, each program sums all of K in one order, and no program works on K beside another:
the bits of a row are those of that row, of the weight and of the GPU. What it costs beside the tuned GEMM:
``scripts/bench_kernels --invariant``.

FP32 accumulation by the tensor cores (of FP8 in their own, narrower one on SM90, as the tuned candidates have it);
scales and bias are applied to the sum, one rounding to BF16.

SGLang's ``matmul_kernel_persistent`` and DeepGEMM's BF16 GEMM keep the same promise for BF16: ``docs/kernels.md``.

Refused (ValueError): shapes and dtypes that do not fit together, K not a multiple of 16, codes that are not contiguous.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.limits import BLOCK
from mixquant_sglang.kernels.triton.checks import capability, require
from mixquant_sglang.kernels.triton.compiled import Compiled

TILE = (128, 128)  # rows and columns
DEPTH = {torch.float8_e4m3fn: 128, torch.bfloat16: 64}  # of K at a time: 128 bytes of a row
WARPS = 8
_GROUP = 8  # tiles of rows that run beside each other, so that they find the weight's in the L2 cache


def scaled_mm(
    xq: torch.Tensor,
    wq: torch.Tensor,
    sx: torch.Tensor | None,
    sw: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes xq [M, K] and wq [N, K], both float8_e4m3fn or both bfloat16, sx float32 [M, 1] or None for ones, sw
    float32 [N], of any stride, bias bfloat16 [N] -> bfloat16 [M, N], or in ``out``, whose columns are contiguous.

    M >= 0. No synchronisation, fit for CUDA graphs. ValueError: see above."""
    n, k = wq.shape
    m = len(xq)
    if xq.dtype not in DEPTH or k % BLOCK or k == 0:
        raise ValueError(f"codes must be float8_e4m3fn or bfloat16 of K a multiple of {BLOCK}, got {xq.dtype}, K = {k}")
    require(xq, "xq", ("M", k), xq.dtype)
    require(wq, "wq", ("N", k), xq.dtype)
    if sx is not None:
        require(sx, "sx", (m, 1), torch.float32)
    if bias is not None:
        require(bias, "bias", (n,))
    if sw.dtype is not torch.float32 or sw.shape != (n,):
        raise ValueError(f"sw must be float32 [{n}], got {sw.dtype} {list(sw.shape)}")
    if out is None:
        out = torch.empty((m, n), dtype=torch.bfloat16, device=xq.device)
    elif out.dtype is not torch.bfloat16 or out.shape != (m, n) or out.stride(1) != 1:
        raise ValueError(f"out must be bfloat16 [{m}, {n}], row major, got {out.dtype} {list(out.shape)}")
    if m == 0 or n == 0:
        return out
    depth, stages = DEPTH[xq.dtype], _stages(wq.device)
    pointers = xq.data_ptr() | wq.data_ptr() | out.data_ptr() | sw.data_ptr()
    pointers |= (0 if sx is None else sx.data_ptr()) | (0 if bias is None else bias.data_ptr())
    _compiled.launch(
        _scaled_matmul,
        (wq.device, xq.dtype, n, k, sw.stride(0), out.stride(0), sx is None, bias is None),
        pointers,
        (-(-m // TILE[0]) * -(-n // TILE[1]), 1, 1),
        (xq, wq, out, sx, sw, bias, m, n, k, sw.stride(0), out.stride(0)),
        (*TILE, depth, _GROUP, k % depth == 0),
        {"num_warps": WARPS, "num_stages": stages},
    )
    return out


_compiled = Compiled()


@functools.cache
def _stages(device: torch.device) -> int:
    """Of 32 KiB each: three where a program has more than 100 KiB of shared memory."""
    if device.type != "cuda":  # Triton interprets
        return 1
    return 3 if capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3)) else 2


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _scaled_matmul(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    scale_stride: tl.tensor,
    out_stride: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """BM rows and BN columns of out; WHOLE: BK divides K."""
    pid = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    beside = tl.minimum(tl.cdiv(rows, BM) - first, GROUP)
    inner = pid % (GROUP * columns)
    m = (first + inner % beside) * BM + tl.arange(0, BM)
    n = inner // beside * BN + tl.arange(0, BN)
    live, wanted = m < rows, n < N
    depth = tl.arange(0, BK)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * K + depth[None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[:, None] * K + depth[None, :]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        if WHOLE:
            x = tl.load(x_ptrs, mask=live[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=wanted[:, None], other=0.0)
        else:
            there = (depth < K - k)[None, :]
            x = tl.load(x_ptrs, mask=live[:, None] & there, other=0.0)
            weight = tl.load(weight_ptrs, mask=wanted[:, None] & there, other=0.0)
        total = tl.dot(x, weight.T, total)
        x_ptrs += BK
        weight_ptrs += BK
    if x_scale_ptr is not None:
        total *= tl.load(x_scale_ptr + m, mask=live, other=0.0)[:, None]
    total *= tl.load(scale_ptr + n * scale_stride, mask=wanted, other=0.0)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=wanted, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(out_ptrs, total.to(tl.bfloat16), mask=live[:, None] & wanted[None, :])
