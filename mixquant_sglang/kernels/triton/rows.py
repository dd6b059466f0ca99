"""Picking rows out of a batch and putting them back, inside captured CUDA graphs.

A captured prefill graph has a fixed number of slots for protected rows; which rows they are changes with every replay.
So the row numbers live in an index buffer on the device, -1 marks a slot that is not in use, and nothing here looks at
their values on the host. Torch's own ``index_select`` and ``index_copy_`` have no -1.
``sgl_kernel.shuffle_rows``, and per-row alpha in FlashInfer's ``mm_fp4``: ``docs/kernels.md``.

Row numbers are not checked against the number of rows: the caller fills the buffer. Refused (ValueError): tensors that
are not matrices with contiguous rows, shapes and dtypes that do not fit together, an index that is not int32 or int64.
CUDA only.
"""

import torch
import triton
import triton.language as tl

_COLUMNS = 2048  # for each program


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``out[i] = x[index[i]]``, zeros where ``index[i]`` is -1: x [T, K], index int32 or int64 [R] -> [R, K] like x."""
    _require(x, "x")
    _require_index(index, index.shape[0] if index.ndim == 1 else -1)
    out = torch.empty((index.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    if out.numel():
        grid = (out.shape[0], triton.cdiv(out.shape[1], _COLUMNS))
        _gather[grid](x, index, out, x.shape[1], x.stride(0), COLUMNS=_COLUMNS)
    return out


def scatter_rows_(out: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> None:
    """``out[index[i]] = rows[i]`` where ``index[i]`` is not -1: out [T, N], rows [R, N] like out, index int32 or int64
    [R].

    A row number that occurs twice gets one of its rows or a mixture; the caller must not do that.
    """
    _require(out, "out")
    _require(rows, "rows")
    _require_index(index, rows.shape[0])
    if rows.shape[1] != out.shape[1] or rows.dtype != out.dtype:
        raise ValueError(
            f"rows {rows.dtype} {list(rows.shape)} do not fit into out {out.dtype} {list(out.shape)}: "
            "same dtype and number of columns needed"
        )
    if rows.numel():
        grid = (rows.shape[0], triton.cdiv(rows.shape[1], _COLUMNS))
        _scatter[grid](out, rows, index, rows.shape[1], out.stride(0), rows.stride(0), COLUMNS=_COLUMNS)


def scale_rows_(out: torch.Tensor, scales: torch.Tensor) -> None:
    """``out[m] *= scales[m]`` in FP32 with one rounding: out bfloat16 [M, N], scales float32 [M], contiguous.

    Exact for powers of two that stay in BF16's exponent range.
    """
    _require(out, "out")
    if out.dtype != torch.bfloat16 or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"out must be bfloat16 and scales contiguous float32, got {out.dtype} and {scales.dtype}")
    if scales.shape != (out.shape[0],):
        raise ValueError(f"scales must be [{out.shape[0]}], got {list(scales.shape)}")
    if out.numel():
        grid = (out.shape[0], triton.cdiv(out.shape[1], _COLUMNS))
        _scale[grid](out, scales, out.shape[1], out.stride(0), COLUMNS=_COLUMNS)


def _require(tensor: torch.Tensor, name: str) -> None:
    if tensor.ndim != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(
            f"{name} must be a matrix with contiguous rows, got {list(tensor.shape)} with strides {tensor.stride()}"
        )


def _require_index(index: torch.Tensor, rows: int) -> None:
    if index.dtype not in (torch.int32, torch.int64) or index.shape != (rows,) or not index.is_contiguous():
        raise ValueError(
            f"index must be contiguous int32 or int64 [{'R' if rows < 0 else rows}], "
            f"got {index.dtype} {list(index.shape)}"
        )


@triton.jit  # type: ignore[untyped-decorator]
def _gather(
    x_ptr: tl.tensor,
    index_ptr: tl.tensor,
    out_ptr: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + slot).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    value = tl.load(x_ptr + row * x_stride + column, mask=mask & (row >= 0), other=0.0)
    tl.store(out_ptr + slot * columns + column, value, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _scatter(
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    index_ptr: tl.tensor,
    columns: tl.tensor,
    out_stride: tl.tensor,
    rows_stride: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + slot).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (column < columns) & (row >= 0)
    tl.store(out_ptr + row * out_stride + column, tl.load(rows_ptr + slot * rows_stride + column, mask=mask), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _scale(
    out_ptr: tl.tensor, scale_ptr: tl.tensor, columns: tl.tensor, out_stride: tl.tensor, COLUMNS: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    pointer = out_ptr + row * out_stride + column
    value = tl.load(pointer, mask=mask).to(tl.float32) * tl.load(scale_ptr + row)
    tl.store(pointer, value.to(out_ptr.dtype.element_ty), mask=mask)
