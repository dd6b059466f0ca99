"""What FP8 attention needs around FlashAttention: keys and values out of the paged cache to E4M3, queries to E4M3, and
the merging of segments.  The numbers are those of ``kernels/attention.py``.

Refused (ValueError): heads whose size is no power of two; tensors that do not fit together.  CUDA only, SM89 or newer.
"""

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.attention import LARGEST_OF_SAMPLE
from mixquant_sglang.kernels.triton.checks import require

_SAMPLED = 256  # tokens at a time
_COLUMNS = 32  # of the sample, for each program
_TOKENS = 64  # to E4M3, for each program
_ROWS = 32  # merged by each program


def quantize_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    tokens: int,
    low_keys: torch.Tensor,
    low_values: torch.Tensor,
) -> torch.Tensor:
    """Keys minus their mean and values of one request to E4M3, into ``low_keys`` and ``low_values`` [N, heads, size].

    ``keys``, ``values``: the cache of a layer, BF16 [slots, heads, size]; ``slots``: int32 [N], where the request's
    tokens lie in it; the first ``tokens`` of them are its sample.  Returns the scales, FP32 [2, heads]: of keys and of
    values."""
    count, (heads, size) = len(slots), keys.shape[1:]
    if size & (size - 1):
        raise ValueError(f"heads must be of a power of two elements, got {size}")
    require(keys, "keys", ("slots", heads, size))
    require(values, "values", (len(keys), heads, size))
    require(slots, "slots", (count,), torch.int32)
    require(low_keys, "low_keys", (count, heads, size), torch.float8_e4m3fn)
    require(low_values, "low_values", (count, heads, size), torch.float8_e4m3fn)
    width = heads * size
    statistics = torch.empty(3, width, dtype=torch.float32, device=keys.device)
    scales = torch.empty(2, heads, dtype=torch.float32, device=keys.device)
    _sample[(triton.cdiv(width, _COLUMNS),)](
        keys, values, slots, statistics, min(tokens, count), width, TOKENS=_SAMPLED, COLUMNS=_COLUMNS
    )
    _quantize_cache[(triton.cdiv(count, _TOKENS), heads)](
        *(keys, values, slots, statistics, low_keys, low_values, scales, count),
        HEADS=heads,
        SIZE=size,
        TOKENS=_TOKENS,
        LARGEST=LARGEST_OF_SAMPLE,
    )
    return scales


def quantize_queries(q: torch.Tensor, out: torch.Tensor) -> None:
    """``q`` BF16 [rows, N], contiguous rows, to E4M3 as it is, saturating, into ``out`` [rows, N]."""
    rows, width = q.shape
    if q.dtype != torch.bfloat16 or q.stride(1) != 1:
        raise ValueError(f"q must be bfloat16 with contiguous rows, got {q.dtype} with strides {q.stride()}")
    require(out, "out", (rows, width), torch.float8_e4m3fn)
    columns = 4096
    _quantize_queries[(rows, triton.cdiv(width, columns))](q, out, width, q.stride(0), COLUMNS=columns)


def merge(parts: torch.Tensor, sums: torch.Tensor, count: int, out: torch.Tensor, out_sums: torch.Tensor) -> None:
    """Merges the first ``count`` of ``parts`` BF16 [P, R, heads, size] by their ``sums`` FP32 [P, heads, R], which are
    logarithms, into ``out`` BF16 [rows, heads, size] and ``out_sums`` FP32 [heads, R], rows <= R; both may be among the
    parts."""
    rows, heads, size = out.shape
    most = parts.shape[1]
    require(parts, "parts", ("P", most, heads, size))
    require(sums, "sums", (len(parts), heads, most), torch.float32)
    require(out, "out", (rows, heads, size))
    require(out_sums, "out_sums", (heads, most), torch.float32)
    if rows > most or not 1 <= count <= len(parts) or size & (size - 1):
        raise ValueError(f"cannot merge {count} parts of {rows} rows, {heads} heads of {size}: there is {parts.shape}")
    _merge[(triton.cdiv(rows, _ROWS), heads)](
        parts, sums, out, out_sums, rows, most, HEADS=heads, SIZE=size, COUNT=count, ROWS=_ROWS
    )


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _sample(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """For each column: the mean of K, the largest distance from it, the largest magnitude of V."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    most = tl.full((COLUMNS,), float("-inf"), tl.float32)
    least = tl.full((COLUMNS,), float("inf"), tl.float32)
    largest = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        slot = tl.load(slots_ptr + token, mask=token < tokens, other=0).to(tl.int64)
        place = slot[:, None] * width + column[None, :]
        there = (token < tokens)[:, None] & inside[None, :]
        k = tl.load(k_ptr + place, mask=there, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + place, mask=there, other=0.0).to(tl.float32)
        total += tl.sum(k, 0)
        most = tl.maximum(most, tl.max(tl.where(there, k, float("-inf")), 0))
        least = tl.minimum(least, tl.min(tl.where(there, k, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.abs(v), 0))
    mean = tl.div_rn(total, tokens.to(tl.float32) + tl.zeros((COLUMNS,), tl.float32))
    tl.store(out_ptr + column, mean, mask=inside)
    tl.store(out_ptr + width + column, tl.maximum(most - mean, mean - least), mask=inside)
    tl.store(out_ptr + 2 * width + column, largest, mask=inside)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _quantize_cache(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    low_k_ptr: tl.tensor,
    low_v_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    count: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    block, head = tl.program_id(0), tl.program_id(1)
    token = block * TOKENS + tl.arange(0, TOKENS)
    column = head * SIZE + tl.arange(0, SIZE)
    mean = tl.load(statistics_ptr + column)
    k_scale = _power_of_two(tl.max(tl.load(statistics_ptr + HEADS * SIZE + column), 0), LARGEST)
    v_scale = _power_of_two(tl.max(tl.load(statistics_ptr + 2 * HEADS * SIZE + column), 0), LARGEST)
    if block == 0:
        tl.store(scales_ptr + head, k_scale)
        tl.store(scales_ptr + HEADS + head, v_scale)
    there = (token < count)[:, None]
    slot = tl.load(slots_ptr + token, mask=token < count, other=0).to(tl.int64)
    source = slot[:, None] * (HEADS * SIZE) + column[None, :]
    target = token.to(tl.int64)[:, None] * (HEADS * SIZE) + column[None, :]
    k = tl.load(k_ptr + source, mask=there, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + source, mask=there, other=0.0).to(tl.float32)
    tl.store(low_k_ptr + target, _e4m3((k - mean[None, :]) * tl.div_rn(1.0, k_scale)), mask=there)
    tl.store(low_v_ptr + target, _e4m3(v * tl.div_rn(1.0, v_scale)), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_queries(
    x_ptr: tl.tensor, out_ptr: tl.tensor, width: tl.tensor, stride: tl.tensor, COLUMNS: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, _e4m3(x), mask=column < width)


@triton.jit(do_not_specialize=["rows", "most"])  # type: ignore[untyped-decorator]
def _merge(
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_sums_ptr: tl.tensor,
    rows: tl.tensor,
    most: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    place = row.to(tl.int64)[:, None] * (HEADS * SIZE) + (head * SIZE + tl.arange(0, SIZE))[None, :]
    sums = sums_ptr + head * most + row
    part_size = most.to(tl.int64) * (HEADS * SIZE)
    largest = tl.load(sums, mask=there, other=0.0)
    for i in tl.static_range(1, COUNT):
        largest = tl.maximum(largest, tl.load(sums + i * HEADS * most, mask=there, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, SIZE), tl.float32)
    for i in tl.static_range(COUNT):
        weight = tl.exp(tl.load(sums + i * HEADS * most, mask=there, other=0.0) - largest)
        part = tl.load(parts_ptr + i * part_size + place, mask=there[:, None], other=0.0).to(tl.float32)
        total += weight
        result += weight[:, None] * part
    result = result * tl.div_rn(1.0, total)[:, None]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=there[:, None])
    tl.store(out_sums_ptr + head * most + row, largest + tl.log(total), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _e4m3(x: tl.tensor) -> tl.tensor:
    """Saturating; NaN stays."""
    low = tl.minimum(x, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(low, -448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit  # type: ignore[untyped-decorator]
def _power_of_two(largest: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    x = tl.div_rn(largest, LARGEST)
    x = tl.minimum(tl.maximum(x, 7.888609052210118e-31), 1.2676506002282294e30)  # 2^-100, 2^100
    return (((x.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23) << 23).to(tl.float32, bitcast=True)
