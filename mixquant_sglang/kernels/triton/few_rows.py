"""The BF16 linear of a few protected rows, written over their rows of a low-precision result.

    out[index[r], n] = sum_k rows[r, k] weight[n, k] + bias[n]     for every r with index[r] >= 0

The weights are read once for up to 128 rows, so of few this is bound by memory: 2 bytes for each weight. Whether there
are none, up to 16, 32, 64 or more rows is seen when the kernel runs. Without any it returns at once: a captured pass
that protects nothing pays for launches alone (a large one runs without its graph, and so without this). cuBLAS reads
the weights as fast, but has no early return and needs a second kernel to put the rows in their places.

On an H200, Qwen3-8B's four linears take 107 us a layer behind FP8 GEMMs of 512 rows and 115 us behind those of 2048;
their bytes alone take 88 us. Nothing was gained by starting before the GEMM has ended, by letting the next kernel start
early (dependent launches), by a second stream beside a GEMM that leaves 4 to 16 of the 132 SMs free (4 cost the GEMM
nothing), by hints to the L2 cache, by loads through registers, or by one kernel, with barriers inside, for all between
two attentions. A kernel that fetches 8 MB of the weights into the L2 cache ahead of the GEMM ("evict_last")
saves 1.6 us a linear and takes 2; within a kernel that runs there anyway it might pay.

FP32 accumulation along K in steps that depend on the weight's shape alone, one rounding to BF16: no row depends on the
others. Used row numbers must come first in ``index`` and must differ.

FlashInfer's ``tinygemm_bf16`` is for a known number of rows, ideally 1 to 8: ``docs/kernels.md``.

Refused (ValueError): shapes and dtypes that do not fit together, more than 256 slots, K not a multiple of 16, tensors
that are not row major. CUDA only.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.limits import BLOCK, FEW_ROWS, MANY_ROWS
from mixquant_sglang.kernels.triton.compiled import Compiled

FEW = 16  # rows: the least that tensor cores take
BUCKETS = (FEW, 2 * FEW, FEW_ROWS, MANY_ROWS)  # slots: what a kernel is compiled for
GROUP = 128  # rows at a time of more than FEW_ROWS


def linear_rows_(
    out: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
) -> None:
    """In place: out bfloat16 [T, N], index int64 [R], rows bfloat16 [R, K], weight bfloat16 [N, K], bias bfloat16 [N].

    With ``rest`` bfloat16 [T, N - A], out is [T, A], A a multiple of 64, and the columns from A on go to ``rest``.
    ``index`` is read when the kernel runs, -1 for unused slots at its end; row numbers are not checked against T. No
    synchronisation, fit for CUDA graphs.
    """
    n, k = weight.shape
    slots, cut = index.shape[0], n if rest is None else out.shape[1]
    fits = (
        out.dtype is rows.dtype is weight.dtype is torch.bfloat16
        and index.dtype is torch.int64
        and out.shape == (out.shape[0], cut)
        and rows.shape == (slots, k)
        and out.stride(1) == rows.stride(1) == weight.stride(1) == 1
        and index.ndim == 1
        and index.is_contiguous()
        and slots <= MANY_ROWS
        and k > 0
        and k % BLOCK == 0
    )
    if rest is not None:
        fits = fits and rest.dtype is torch.bfloat16 and rest.shape == (out.shape[0], n - cut) and rest.stride(1) == 1
        fits = fits and cut % 64 == 0
    if not fits or bias is not None:
        _check(out, index, rows, weight, bias, rest)
    if slots == 0 or n == 0:
        return
    device = weight.get_device()
    block_n, block_k, stages = _tiles(n, k, _shared_memory(device))
    many = FEW if slots <= FEW else next(bucket for bucket in BUCKETS if bucket >= slots)
    strides = (out.stride(0), out.stride(0) if rest is None else rest.stride(0), rows.stride(0), weight.stride(0))
    pointers = out.data_ptr() | index.data_ptr() | rows.data_ptr() | weight.data_ptr()
    if rest is not None:
        pointers |= rest.data_ptr()
    if bias is not None:
        pointers |= bias.data_ptr()
    _compiled.launch(
        _linear_rows,
        (device, n, k, cut, many, bias is None, rest is None, *strides),
        pointers,
        (-(-n // block_n), 1, 1),  # ``triton.cdiv`` takes as long as the launch
        (out, out if rest is None else rest, index, rows, weight, bias, slots, n, cut, *strides),
        (
            *(k, FEW, many, block_n, block_k, min(block_k, 64), min(block_k, 64), GROUP),
            *(bias is not None, n % block_n == 0, weight.is_cuda),
        ),
        {"num_warps": 4, "num_stages": stages},
    )


_compiled = Compiled()


def _check(
    out: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rest: torch.Tensor | None,
) -> None:
    n, k = weight.shape
    cut = n if rest is None else out.shape[1]
    wanted = [("out", out, (len(out), cut)), ("rows", rows, (len(index), k)), ("weight", weight, (n, k))]
    if rest is not None:
        wanted.append(("rest", rest, (len(out), n - cut)))
        if cut % 64:
            raise ValueError(f"out must have a multiple of 64 columns beside rest, got {cut}")
    for name, tensor, shape in wanted:
        if tensor.dtype != torch.bfloat16 or tensor.shape != shape or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} must be bfloat16 {list(shape)}, row major; "
                f"got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous bfloat16 [{n}], got {bias.dtype} {list(bias.shape)}")
    if index.dtype != torch.int64 or index.ndim != 1 or len(index) > MANY_ROWS or not index.is_contiguous():
        raise ValueError(f"index must be contiguous int64 [R], R <= {MANY_ROWS}, got {index.dtype} {list(index.shape)}")
    if k % BLOCK or k == 0:
        raise ValueError(f"K must be a positive multiple of {BLOCK}, got {k}")


@functools.cache
def _tiles(n: int, k: int, shared_memory: int) -> tuple[int, int, int]:
    """Weight rows and columns of a tile, and the tiles in flight: the fastest on an H200 of 15 tried for each linear of
    Qwen3-8B between its FP8 GEMMs (512 and 2048 rows), with fewer in flight where shared memory is short."""
    block_n, block_k, stages = (32, 256, 5) if n < 6144 else (32, 128, 6) if n < 16384 else (64, 128, 3)
    while block_k > 16 and k % block_k:
        block_k //= 2
    return block_n, block_k, max(2, min(stages, shared_memory // (2 * block_k * (block_n + FEW))))


@functools.cache
def _shared_memory(device: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@triton.jit(do_not_specialize=["slots"])  # type: ignore[untyped-decorator]
def _linear_rows(
    out_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    index_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    slots: tl.tensor,
    N: tl.tensor,
    cut: tl.tensor,
    out_stride: tl.tensor,
    rest_stride: tl.tensor,
    rows_stride: tl.tensor,
    weight_stride: tl.tensor,
    K: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FEW_K: tl.constexpr,
    SOME_K: tl.constexpr,
    MANY_K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    PREFETCH: tl.constexpr,
) -> None:
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(0) * BLOCK_N >= cut:  # a tile of ``rest``
        out_ptr = rest_ptr - cut
        out_stride = rest_stride
    if PREFETCH:  # the first tile is on its way to the L2 cache before it is known that there are rows
        line = tl.arange(0, FEW_K * 2 // 128 if FEW_K >= 64 else 1) * 64
        first_tile = weight_ptr + tl.minimum(n, N - 1)[:, None].to(tl.int64) * weight_stride + line[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [first_tile], dtype=tl.int32, is_pure=False, pack=1
        )
    # Nothing can be done before these arrive: they are asked for together, and stay in the cache for the next linear.
    first = tl.load(index_ptr, eviction_policy="evict_last")
    beyond = tl.load(index_ptr + FEW, mask=slots > FEW, other=-1, eviction_policy="evict_last")
    beyond_two = tl.load(index_ptr + 2 * FEW, mask=slots > 2 * FEW, other=-1, eviction_policy="evict_last")
    beyond_four = tl.load(index_ptr + 4 * FEW, mask=slots > 4 * FEW, other=-1, eviction_policy="evict_last")
    if MANY > 4 * FEW and beyond_four >= 0:
        for group in range(0, slots, GROUP):
            if tl.load(index_ptr + group) >= 0:
                _rows(
                    out_ptr, index_ptr, slots, rows_ptr, weight_ptr, bias_ptr, n, N, group,
                    out_stride, rows_stride, weight_stride, K, GROUP, BLOCK_N, MANY_K, 3, HAS_BIAS, WHOLE,
                )  # fmt: skip
    elif MANY > 2 * FEW and beyond_two >= 0:
        _rows(
            out_ptr, index_ptr, slots, rows_ptr, weight_ptr, bias_ptr, n, N, 0,
            out_stride, rows_stride, weight_stride, K, 4 * FEW, BLOCK_N, MANY_K, None, HAS_BIAS, WHOLE,
        )  # fmt: skip
    elif MANY > FEW and beyond >= 0:
        _rows(
            out_ptr, index_ptr, slots, rows_ptr, weight_ptr, bias_ptr, n, N, 0,
            out_stride, rows_stride, weight_stride, K, 2 * FEW, BLOCK_N, SOME_K, None, HAS_BIAS, WHOLE,
        )  # fmt: skip
    elif first >= 0:
        _rows(
            out_ptr, index_ptr, slots, rows_ptr, weight_ptr, bias_ptr, n, N, 0,
            out_stride, rows_stride, weight_stride, K, FEW, BLOCK_N, FEW_K, None, HAS_BIAS, WHOLE,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _rows(
    out_ptr: tl.tensor,
    index_ptr: tl.tensor,
    slots: tl.tensor,
    rows_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    start: tl.tensor,
    out_stride: tl.tensor,
    rows_stride: tl.tensor,
    weight_stride: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """ROWS slots from ``start`` on, for the BLOCK_N columns ``n`` of out; WHOLE: none of them is beyond N."""
    slot = start + tl.arange(0, ROWS)
    row = tl.load(index_ptr + slot, mask=slot < slots, other=-1, eviction_policy="evict_last")
    column = tl.arange(0, BLOCK_K)
    weight = weight_ptr + n[:, None].to(tl.int64) * weight_stride + column[None, :]
    x = rows_ptr + slot[None, :].to(tl.int64) * rows_stride + column[:, None]
    total = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w_tile = tl.load(weight + k) if WHOLE else tl.load(weight + k, mask=n[:, None] < N, other=0.0)
        x_tile = tl.load(x + k, mask=row[None, :] >= 0, other=0.0)
        total = tl.dot(w_tile, x_tile, total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + row[None, :] * out_stride + n[:, None]
    tl.store(target, total.to(tl.bfloat16), mask=(row[None, :] >= 0) & (n[:, None] < N))
