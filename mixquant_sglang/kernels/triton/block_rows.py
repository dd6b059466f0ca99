"""Linears of BF16 rows and FP8 weights in blocks of 128 x 128: W8A16 of checkpoints with ``weight_scale_inv``.

    out[index[r], n] = sum_b scale[n // 128, b] * sum_{k in b} rows[r, k] weight[n, k] + bias[n]   for index[r] >= 0

As ``packed_rows.py``, but that each block along K is summed by itself, in FP32 on tensor cores, and then scaled: the
weights become BF16 in registers, which is exact, and the result is rounded once.  Programs do not share a tile, so
short and wide weights fill no GPU at few rows: nothing here was timed.  No row depends on another.

Refused (ValueError): shapes and dtypes that do not fit together, K not a multiple of 16, tensors that are not row
major, ``index`` with more than ``MANY_ROWS`` slots.  N and the last block along K may be cut short.  CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixquant_sglang.formats.fp8_blocks import blocks_of
from mixquant_sglang.kernels.limits import BLOCK, MANY_ROWS
from mixquant_sglang.kernels.triton.launch import sm
from mixquant_sglang.kernels.triton.widen import e4m3_to_bf16

BUCKETS = (16, 64)  # rows: what a kernel is compiled for; more take several tiles of the last
BLOCK_N = 32  # divides 128, so a tile's rows share their scales
_WARPS = 4
_STAGES = 4


def block_rows(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows bfloat16 [R, K], codes float8_e4m3fn [N, K], scales float32 [ceil(N / 128), ceil(K / 128)], bias bfloat16
    [N] -> bfloat16 [R, N].

    With ``index`` int64 [R] in place into ``out`` bfloat16 [T, N] (and ``rest``), as in ``few_rows.linear_rows_``. No
    synchronisation, fit for CUDA graphs."""
    (n, k), m = codes.shape, len(rows)
    if out is None:
        out = torch.empty((m, n), dtype=torch.bfloat16, device=rows.device)
    cut = n if rest is None else out.shape[1]
    _check(rows, codes, scales, bias, out, index, rest)
    if m == 0 or n == 0:
        return out
    bucket = next((bucket for bucket in BUCKETS if bucket >= m), BUCKETS[-1])
    _block_rows[(triton.cdiv(m, bucket) * triton.cdiv(n, BLOCK_N),)](
        out,
        out if rest is None else rest,
        index,
        rows,
        codes.view(torch.uint8),
        scales,
        bias,
        m,
        n,
        k,
        cut,
        out.stride(0),
        out.stride(0) if rest is None else rest.stride(0),
        rows.stride(0),
        ROWS=bucket,
        BLOCK_N=BLOCK_N,
        TILE=128,
        WHOLE=n % BLOCK_N == 0 and k % 128 == 0,
        SM=sm(rows.device),
        num_warps=_WARPS,
        num_stages=_STAGES,
        enable_fp_fusion=False,
    )
    return out


def _check(
    rows: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    index: torch.Tensor | None,
    rest: torch.Tensor | None,
) -> None:
    (n, k), m = codes.shape, len(rows)
    if k % BLOCK or k == 0:
        raise ValueError(f"K must be a positive multiple of {BLOCK}, got {k}")
    cut = n if rest is None else out.shape[1]
    wanted: list[tuple[str, torch.Tensor, torch.dtype, tuple[int, ...]]] = [
        ("rows", rows, torch.bfloat16, (m, k)),
        ("out", out, torch.bfloat16, (m if index is None else len(out), cut)),
        ("codes", codes, torch.float8_e4m3fn, (n, k)),
        ("scales", scales, torch.float32, (blocks_of(n), blocks_of(k))),
    ]
    if rest is not None:
        wanted.append(("rest", rest, torch.bfloat16, (len(out), n - cut)))
        if cut % 64:
            raise ValueError(f"out must have a multiple of 64 columns beside rest, got {cut}")
    if bias is not None:
        wanted.append(("bias", bias, torch.bfloat16, (n,)))
    if index is not None:
        wanted.append(("index", index, torch.int64, (m,)))
        if m > MANY_ROWS:
            raise ValueError(f"index must have at most {MANY_ROWS} slots, got {m}")
    for name, tensor, dtype, shape in wanted:
        dense = tensor.is_contiguous() if name not in ("rows", "out", "rest") else tensor.stride(1) == 1
        if tensor.dtype != dtype or tensor.shape != shape or not dense:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)}, row major; "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _block_rows(
    out_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    index_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    cut: tl.tensor,
    out_stride: tl.tensor,
    rest_stride: tl.tensor,
    rows_stride: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    SM: tl.constexpr,
) -> None:
    """``rows``: how many there are, of which a tile takes ROWS. WHOLE: no tile is cut short."""
    over_m = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0)
    first_n = tile // over_m * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    slot = tile % over_m * ROWS + tl.arange(0, ROWS)
    row = slot
    if index_ptr is not None:
        row = tl.load(index_ptr + slot, mask=slot < rows, other=-1)
        if tl.load(index_ptr + tile % over_m * ROWS) < 0:
            return
    used = (slot < rows) & (row >= 0)
    column = tl.arange(0, TILE)
    codes = codes_ptr + n[:, None].to(tl.int64) * K + column[None, :]
    x = rows_ptr + slot[None, :].to(tl.int64) * rows_stride + column[:, None]
    scales = scale_ptr + first_n // TILE * tl.cdiv(K, TILE)
    total = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    for start in range(0, K, TILE):
        if WHOLE:
            code = tl.load(codes + start)
            x_tile = tl.load(x + start, mask=used[None, :], other=0.0)
        else:
            inside = start + column < K
            code = tl.load(codes + start, mask=(n[:, None] < N) & inside[None, :], other=0)
            x_tile = tl.load(x + start, mask=used[None, :] & inside[:, None], other=0.0)
        part = tl.dot(e4m3_to_bf16(code, SM), x_tile)
        total += part * tl.load(scales + start // TILE)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if first_n >= cut:  # a tile of ``rest``
        out_ptr = rest_ptr - cut
        out_stride = rest_stride
    mask = used[None, :] & (n[:, None] < N)
    tl.store(out_ptr + row[None, :].to(tl.int64) * out_stride + n[:, None], total.to(tl.bfloat16), mask=mask)
