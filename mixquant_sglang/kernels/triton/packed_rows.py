"""Linears of BF16 rows and packed weights: W8A16 of FP8, W4A16 of NVFP4.

    out[index[r], n] = scale[n] * sum_k rows[r, k] weight[n, k] + bias[n]     for every r with index[r] >= 0

The weights are the bytes that prefill's GEMM reads: they become BF16 in registers, which is exact (E4M3, and E2M1 times
a block scale of E4M3), and tensor cores add in FP32. Scales are applied to the sum, which is rounded once: the numbers
of ``formats/`` up to the order of the sum, which depends on the weight's shape and the bucket of the number of rows. No
row depends on another. Up to 128 rows the weights are read once: 1 or 0.5625 bytes each.

There are two kernels, and ``packed_tiles.choose`` says which serves. ``packed_warps.py`` reads the weights of few rows
straight into registers. ``packed_tiled.py`` has tiles of them in flight through shared memory; where these are too few
to fill a GPU, programs share a tile along K, through FP32 sums in a scratch and ``locks``.

SGLang's Marlin for FP8 and FP4 weights wants them in a layout of its own, a second copy: ``docs/kernels.md``.

Refused (ValueError): shapes and dtypes that do not fit together, K not a multiple of 16, tensors that are not row
major, ``index`` with more than ``MANY_ROWS`` slots. CUDA only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mixquant_sglang.kernels.limits import BLOCK, MANY_ROWS, PLACED
from mixquant_sglang.kernels.triton.compiled import Compiled
from mixquant_sglang.kernels.triton.launch import sm
from mixquant_sglang.kernels.triton.packed_tiled import _packed_rows
from mixquant_sglang.kernels.triton.packed_tiles import (
    BUCKETS,
    LEAST,
    LOCKS,
    Tiles,
    Warps,
    choose,
    fitting,
    shared_memory,
)
from mixquant_sglang.kernels.triton.packed_warps import _packed_warps

# How slots of a captured graph (more than ``PLACED``) are taken. 0: PLACED of them by a program, used or not; 8, 16 or
# 32: programs of few weight rows go over the used ones, up to so many at a time, with a Triton whose compiler lets them
# read weights straight into registers (narrow ones of NVFP4 spill some 100 bytes in the form of 16; timed so).
WALK = FEW_USED = 16


class Packed(NamedTuple):
    """A weight [N, K]. FP8: ``codes`` float8_e4m3fn [N, K] and ``scale`` float32 [N]. NVFP4: ``codes`` uint8 [N, K/2],
    ``scale`` float32 of no dimension, ``block_scales`` float8_e4m3fn [N, K/16], finite and >= 0.

    ``locks``: int32 [LOCKS], zero."""

    codes: torch.Tensor
    scale: torch.Tensor
    locks: torch.Tensor
    block_scales: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        n, width = self.codes.shape
        return n, width if self.block_scales is None else 2 * width


def expect_many_slots(many: bool) -> None:
    """Whether passes use many slots at a time, which tiles take faster. Bits of rows are others then: for a server's
    start."""
    global WALK
    WALK = 0 if many else FEW_USED


def linear_rows(
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
    tiles: Tiles | Warps | None = None,
) -> torch.Tensor:
    """rows bfloat16 [R, K], bias bfloat16 [N] -> bfloat16 [R, N].

    With ``index`` int64 [R] in place into ``out`` bfloat16 [T, N] (and ``rest``), as in ``few_rows.linear_rows_``. No
    synchronisation, fit for CUDA graphs. ``tiles``: others than the measured ones.
    """
    n, m = weight.shape[0], len(rows)
    if out is None:
        out = torch.empty((m, n), dtype=torch.bfloat16, device=rows.device)
    _check(rows, weight, bias, out, index, rest)
    if m == 0 or n == 0:
        return out
    bucket, chosen, walk = _chosen(weight, m, index is not None, tiles, rows.device)
    if isinstance(chosen, Warps):
        _by_warps(out, rest, index, rows, weight, bias, bucket, walk, chosen)
    else:
        _by_tiles(out, rest, index, rows, weight, bias, bucket, chosen)
    return out


def _chosen(
    weight: Packed, m: int, placed: bool, tiles: Tiles | Warps | None, device: torch.device
) -> tuple[int, Tiles | Warps, int]:
    """Of ``m`` rows, or slots, their bucket, what serves, and ``WALK`` where programs go over them."""
    (n, k), fp4, shared = weight.shape, weight.block_scales is not None, shared_memory(device)
    if placed and WALK and m > PLACED:
        few = BUCKETS[0]  # of a row alone, whose bits these are
        chosen = fitting(tiles or choose(n, k, few, fp4), n, k, m, few, fp4, shared)
        if isinstance(chosen, Warps):
            return few, chosen, WALK
    # Of rows to be placed most may be unused slots: those of a smaller tile cost less.
    most = PLACED if placed else BUCKETS[-1]
    bucket = next((bucket for bucket in BUCKETS if bucket >= min(m, most)), most)
    return bucket, fitting(tiles or choose(n, k, bucket, fp4), n, k, m, bucket, fp4, shared), 0


def _by_tiles(
    out: torch.Tensor,
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    bucket: int,
    tiles: Tiles,
) -> None:
    (n, k), m = weight.shape, len(rows)
    bucket = max(bucket, LEAST)
    scales = weight.block_scales
    partial = None
    if tiles.split > 1:
        partial = torch.empty((tiles.split, m, n), dtype=torch.float32, device=rows.device)
    if rest is None:
        rest, cut = out, n
    else:
        cut = out.shape[1]
    sizes = (n, k, cut, out.stride(0), rest.stride(0), rows.stride(0) if scales is None else rows.stride(0) // 2)
    constants = (bucket, tiles.n, tiles.k, tiles.split, n % tiles.n == 0, sm(rows.device))
    _tiled.launch(
        _packed_rows,
        (rows.device.index, scales is None, index is None, bias is None, *sizes, *constants, *tiles),
        _pointers(out, rest, index, rows, weight, bias, partial),
        (-(-m // bucket) * -(-n // tiles.n), tiles.split, 1),
        (
            *(out, rest, index, rows if scales is None else rows.view(torch.int32), weight.codes.view(torch.uint8)),
            *(weight.scale, None if scales is None else scales.view(torch.uint8), bias, partial, weight.locks),
            *(m, *sizes),
        ),
        constants,
        {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": False},
    )


def _by_warps(
    out: torch.Tensor,
    rest: torch.Tensor | None,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    bucket: int,
    walk: int,
    tiles: Warps,
) -> None:
    (n, k), m = weight.shape, len(rows)
    scales = weight.block_scales
    if rest is None:
        rest, cut = out, n
    else:
        cut = out.shape[1]
    width = k if scales is None else k // 2  # bytes
    unit = 2 if width % 16 else 4  # words that a weight row has some times
    whole = width % (64 * tiles.pieces * tiles.warps) == 0
    sizes = (n, width // (4 * unit), cut, out.stride(0), rest.stride(0), rows.stride(0))
    shape = (tiles.n, tiles.pieces, tiles.warps, unit, n % tiles.n == 0, whole)
    taken = walk or (8 if bucket <= 8 else 16)
    constants = (taken, *shape, walk > 0, sm(rows.device))
    options = {"num_warps": tiles.warps, "num_stages": 1, "enable_fp_fusion": False}
    if walk:  # two programs of eight warps for a multiprocessor, which some would miss by few registers
        options["maxnreg"] = 128
    _warped.launch(
        _packed_warps,
        (rows.device.index, scales is None, index is None, bias is None, *sizes, *constants),
        _pointers(out, rest, index, rows, weight, bias, None),
        (-(-n // tiles.n), 1 if walk else -(-m // taken), 1),
        (
            *(out, rest, index, rows if scales is None else rows.view(torch.int32), weight.codes.view(torch.int32)),
            *(weight.scale, None if scales is None else scales.view(torch.uint8), bias),
            *(m, *sizes),
        ),
        constants,
        options,
    )


_tiled, _warped = Compiled(), Compiled()


def _pointers(
    out: torch.Tensor,
    rest: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    partial: torch.Tensor | None,
) -> int:
    """ORed, as ``Compiled`` wants them."""
    found = out.data_ptr() | rest.data_ptr() | rows.data_ptr() | weight.codes.data_ptr()
    found |= weight.scale.data_ptr() | weight.locks.data_ptr()
    for tensor in (index, weight.block_scales, bias, partial):
        if tensor is not None:
            found |= tensor.data_ptr()
    return found


def _check(
    rows: torch.Tensor,
    weight: Packed,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    index: torch.Tensor | None,
    rest: torch.Tensor | None,
) -> None:
    n, k = weight.shape
    m, fp4 = len(rows), weight.block_scales is not None
    if k % BLOCK or k == 0:
        raise ValueError(f"K must be a positive multiple of {BLOCK}, got {k}")
    cut = n if rest is None else out.shape[1]
    wanted = [
        ("rows", rows, torch.bfloat16, (m, k)),
        ("out", out, torch.bfloat16, (m if index is None else len(out), cut)),
        ("codes", weight.codes, torch.uint8 if fp4 else torch.float8_e4m3fn, (n, k // 2 if fp4 else k)),
        ("scale", weight.scale, torch.float32, () if fp4 else (n,)),
        ("locks", weight.locks, torch.int32, (LOCKS,)),
    ]
    if weight.block_scales is not None:
        wanted.append(("block_scales", weight.block_scales, torch.float8_e4m3fn, (n, k // BLOCK)))
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
    if fp4 and rows.stride(0) % 2:
        raise ValueError(f"rows must start at even places, got a stride of {rows.stride(0)}")
