"""From a prefill pass's q, k and v to what attention takes, in one kernel: RMSNorm of each head of q and k (or none),
rotary embedding (neox), and keys and values into the cache.

The numbers are SGLang's to the bit, whose JIT kernels were read as compiled by nvcc 13 (``elementwise/qknorm.cuh`` as
PTX for SM90, ``rope.cuh`` as machine code for SM90, SM100 and SM120; ``*`` and ``+`` round, ``fma`` rounds once):

    s_l = fma(.., fma(x1, x1, x0 * x0))      lane l of 32 sums SIZE / 32 elements that follow each other
    s   = the s_l by halves: l and l + 16, then 8, 4, 2, 1
    x'  = bf16(x * rsqrt(s / SIZE + eps) * weight)
    a', b' = bf16(fma(a, cos, -(b * sin))), bf16(fma(b, cos, a * sin))      a, b: the halves of a head

That a server's own SGLang computes the same is seen at each start (``layers/norm_rope.py``), with its shapes.
SGLang's ``fused_qk_norm_rope`` (other numbers), and its RoPE that writes the cache: ``docs/kernels.md``.

Refused (ValueError): other dtypes than BF16 (positions and slots: int32 or int64; cos and sin: float32), heads of other
sizes than 64, 128 and 256, rows whose elements have gaps or that are no multiple of 64 apart.  CUDA only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mixquant_sglang.kernels.triton.compiled import Compiled

SIZES = (64, 128, 256)  # of a head, for which SGLang has a kernel of one warp for each
_UNIT = 64  # what distances between rows are multiples of


@dataclass(frozen=True)
class Tile:
    """Of a program: heads of one token, and warps."""

    heads: int
    warps: int


TILES = (Tile(8, 4), Tile(16, 4), Tile(16, 8))


def norm_rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, float] | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    size: int,
    tile: Tile = TILES[1],
) -> torch.Tensor:
    """``q`` [T, Q * size], ``k``, ``v`` [T, K * size] BF16; ``weights``: of q's and of k's norm, BF16 [size], and eps.

    ``cos_sin`` float32 [positions, size], cosines first; ``positions``, ``slots`` [at least T]; ``keys``, ``values``
    BF16 [slots, K * size], whose rows ``slots`` get the result, save slot 0, which is padding's and is left alone, as
    by SGLang's ``store_cache``.  ``k`` gets it too.  Returns q's: ``q`` itself where its rows follow each other, else a
    matrix of its own."""
    rows = q.shape[0]
    _check(q, k, v, weights, cos_sin, positions, slots, keys, values, size)
    out = q if q.is_contiguous() else q.new_empty(q.shape)
    if not rows:
        return out
    queries, heads = q.shape[1] // size, k.shape[1] // size
    q_weight, k_weight, eps = weights if weights is not None else (None, None, 0.0)
    tensors = (q, out, k, v, keys, values, cos_sin, positions, slots)
    pointers = 0
    for tensor in (*tensors, *(() if weights is None else weights[:2])):
        pointers |= tensor.data_ptr()
    strides = tuple(tensor.stride(0) // _UNIT for tensor in tensors[:6])
    programs = triton.cdiv(queries, tile.heads) + triton.cdiv(heads, tile.heads)
    kind = (q.device.index, queries, heads, size, tile, weights is None, positions.dtype, slots.dtype)
    _compiled.launch(
        _norm_rope_write,
        kind,
        pointers,
        (rows, programs, 1),
        (q, out, k, v, keys, values, q_weight, k_weight, cos_sin, positions, slots, *strides, eps),
        (queries, heads, size, tile.heads),
        {"num_warps": tile.warps, "enable_fp_fusion": False},
    )
    return out


_compiled = Compiled()


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, float] | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    size: int,
) -> None:
    rows, ints = q.shape[0], (torch.int32, torch.int64)
    if size not in SIZES:
        raise ValueError(f"heads must be of {SIZES} elements, got {size}")
    for name, x in (("q", q), ("k", k), ("v", v), ("keys", keys), ("values", values)):
        fits = x.ndim == 2 and x.dtype is torch.bfloat16 and x.shape[1] % size == 0 and x.shape[1] > 0
        if not fits or x.stride(1) != 1 or x.stride(0) % _UNIT:
            raise ValueError(
                f"{name} must be BF16 rows of heads of {size}, a multiple of {_UNIT} apart, got {x.dtype} "
                f"{list(x.shape)} with strides {x.stride()}"
            )
    if not k.shape == v.shape == (rows, keys.shape[1]) or keys.shape != values.shape:
        raise ValueError(f"k, v and the cache must fit: {[*map(list, (q.shape, k.shape, v.shape, keys.shape))]}")
    if cos_sin.dtype is not torch.float32 or cos_sin.shape[1:] != (size,) or not cos_sin.is_contiguous():
        raise ValueError(f"cos_sin must be contiguous float32 [positions, {size}], got {list(cos_sin.shape)}")
    for name, x in (("positions", positions), ("slots", slots)):
        if x.ndim != 1 or len(x) < rows or x.dtype not in ints or not x.is_contiguous():
            raise ValueError(f"{name} must be integers, one for each of {rows} rows, got {x.dtype} {list(x.shape)}")
    for x in () if weights is None else weights[:2]:
        if x.dtype is not torch.bfloat16 or x.shape != (size,) or not x.is_contiguous():
            raise ValueError(f"weights must be BF16 [{size}], got {x.dtype} {list(x.shape)}")


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["q_stride", "out_stride", "k_stride", "v_stride", "keys_stride", "values_stride", "eps"]
)
def _norm_rope_write(
    q_ptr: tl.tensor,
    out_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    q_weight_ptr: tl.tensor,
    k_weight_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    keys_stride: tl.tensor,
    values_stride: tl.tensor,
    eps: tl.tensor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """A program for HEADS heads of a token: of q, or of k and v.  Strides are in units of 64 elements."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    cos_sin_ptr += tl.load(positions_ptr + row).to(tl.int64) * SIZE
    Q_GROUPS: tl.constexpr = (QUERIES + HEADS - 1) // HEADS
    if group < Q_GROUPS:
        head = group * HEADS + tl.arange(0, HEADS)
        a, b = _rotated(q_ptr + row * (q_stride * 64), head, QUERIES, q_weight_ptr, cos_sin_ptr, eps, SIZE, HEADS)
        _store(out_ptr + row * (out_stride * 64), head, head < QUERIES, a, b, SIZE)
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        head = (group - Q_GROUPS) * HEADS + tl.arange(0, HEADS)
        at = head[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        wanted = tl.broadcast_to(head[:, None] < KEYS, [HEADS, SIZE])
        value = tl.load(v_ptr + row * (v_stride * 64) + at, mask=wanted)
        a, b = _rotated(k_ptr + row * (k_stride * 64), head, KEYS, k_weight_ptr, cos_sin_ptr, eps, SIZE, HEADS)
        _store(k_ptr + row * (k_stride * 64), head, head < KEYS, a, b, SIZE)
        _store(keys_ptr + slot * (keys_stride * 64), head, (head < KEYS) & (slot != 0), a, b, SIZE)
        tl.store(values_ptr + slot * (values_stride * 64) + at, value, mask=wanted & (slot != 0))


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(
    x_ptr: tl.tensor,
    head: tl.tensor,
    COUNT: tl.constexpr,
    weight_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The halves of the heads, BF16 [HEADS, SIZE / 2]."""
    HALF: tl.constexpr = SIZE // 2
    column = tl.arange(0, HALF)
    wanted = tl.broadcast_to(head[:, None] < COUNT, [HEADS, HALF])
    at = head[:, None] * SIZE + column[None, :]
    a = tl.load(x_ptr + at, mask=wanted, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=wanted, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin_ptr + column)[None, :]
    sin = tl.load(cos_sin_ptr + column + HALF)[None, :]
    if weight_ptr is not None:
        total = _lane_sums(a, HEADS, SIZE) + _lane_sums(b, HEADS, SIZE)
        r = tl.rsqrt(_by_halves(total, HEADS) * (1.0 / SIZE) + eps)[:, None]
        a_weight = tl.load(weight_ptr + column).to(tl.float32)[None, :]
        b_weight = tl.load(weight_ptr + column + HALF).to(tl.float32)[None, :]
        a = (a * r * a_weight).to(tl.bfloat16).to(tl.float32)
        b = (b * r * b_weight).to(tl.bfloat16).to(tl.float32)
    cos, sin = tl.broadcast_to(cos, [HEADS, HALF]), tl.broadcast_to(sin, [HEADS, HALF])
    minus = b * sin * -1.0  # with the sign of a zero too, which Triton's own minus loses: it subtracts from 0
    first, second = tl.fma(a, cos, minus), tl.fma(b, cos, a * sin)
    return first.to(tl.bfloat16), second.to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def _lane_sums(x: tl.tensor, HEADS: tl.constexpr, SIZE: tl.constexpr) -> tl.tensor:
    """Of the squares of half a head, float32 [HEADS, SIZE / 2]: [HEADS, 16], each of SIZE / 32 in their order."""
    if SIZE == 64:
        x0, x1 = tl.split(tl.reshape(x, [HEADS, 16, 2]))
        return tl.fma(x1, x1, x0 * x0)
    elif SIZE == 128:
        return _fourth(x, HEADS)
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [HEADS, 16, 2, 4]), (0, 1, 3, 2)))
        total = _fourth(low, HEADS)
        even, odd = tl.split(tl.reshape(high, [HEADS, 16, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return tl.fma(x3, x3, tl.fma(x2, x2, tl.fma(x1, x1, tl.fma(x0, x0, total))))


@triton.jit  # type: ignore[untyped-decorator]
def _fourth(x: tl.tensor, HEADS: tl.constexpr) -> tl.tensor:
    even, odd = tl.split(tl.reshape(x, [HEADS, 16, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return tl.fma(x3, x3, tl.fma(x2, x2, tl.fma(x1, x1, x0 * x0)))


@triton.jit  # type: ignore[untyped-decorator]
def _by_halves(x: tl.tensor, HEADS: tl.constexpr) -> tl.tensor:
    """[HEADS, 16] to [HEADS]; two summands have one order."""
    x = tl.sum(tl.reshape(x, [HEADS, 2, 8]), axis=1)
    x = tl.sum(tl.reshape(x, [HEADS, 2, 4]), axis=1)
    x = tl.sum(tl.reshape(x, [HEADS, 2, 2]), axis=1)
    return tl.sum(x, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _store(
    x_ptr: tl.tensor, head: tl.tensor, wanted: tl.tensor, a: tl.tensor, b: tl.tensor, SIZE: tl.constexpr
) -> None:
    HALF: tl.constexpr = SIZE // 2
    at = head[:, None] * SIZE + tl.arange(0, HALF)[None, :]
    tl.store(x_ptr + at, a, mask=wanted[:, None])
    tl.store(x_ptr + at + HALF, b, mask=wanted[:, None])
