"""Compiles at load what requests will need: Triton compiles a kernel when arguments of a new kind first reach it.

Kinds are told apart by dtypes, constants, ``None``, alignment to 16 bytes and integers that are 1 or multiples of 16.
Sizes of a pass are kept out of that (``do_not_specialize``); what remains is a set for each shape of the model, and the
functions here launch all of it on rows that do nothing.  CUDA only.
"""

from __future__ import annotations

from typing import Any

import torch

from mixquant_sglang.kernels.limits import MANY_ROWS, WIDE
from mixquant_sglang.kernels.triton import (
    activations,
    attention,
    block_rows,
    expert_rows,
    expert_units,
    expert_warps,
    few_rows,
    grouped,
    invariant,
    norm_rope,
    packed_tiled,
    packed_tiles,
    packed_warps,
    row_kernels,
    rows,
    scale_search,
    unpack,
)

ROWS = 16  # of what is launched; any number is of the same kind
KERNELS: tuple[Any, ...] = (
    attention._sample,  # attention's are compiled where they are compared: host/low_attention.py
    attention._quantize_cache,
    attention._quantize_queries,
    attention._merge,
    block_rows._block_rows,
    expert_rows._up,
    expert_rows._down,
    expert_units._list_units,
    expert_units._combine,
    expert_warps._expert_warps,
    few_rows._linear_rows,
    grouped.grouped_matmul,
    norm_rope._norm_rope_write,  # the same: layers/norm_rope.py
    invariant._scaled_matmul,
    packed_tiled._packed_rows,
    packed_warps._packed_warps,
    row_kernels.quantize_rows,
    row_kernels.quantize_pairs,
    unpack._unpack_weights,
    rows._gather,
    rows._scatter,
    rows._scale,
    scale_search._search_scales,
)


def compiled() -> int:
    """How many kernels this process has compiled or loaded so far."""
    return sum(len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values())


def few(weight: torch.Tensor, bias: torch.Tensor | None, cut: int) -> None:
    """``few_rows.linear_rows_`` for every number of rows, with ``bias`` and without; ``cut``: columns of out."""
    n, k = weight.shape
    for slots in few_rows.BUCKETS:
        index = torch.full((slots,), -1, dtype=torch.int64, device=weight.device)
        kept = weight.new_empty(slots, k)
        out = weight.new_empty(ROWS, cut or n)
        rest = weight.new_empty(ROWS, n - cut) if cut else None
        for each in (None, bias) if bias is not None else (None,):
            few_rows.linear_rows_(out, index, kept, weight, each, rest=rest)


def weight_only(packed: Any, n: int, k: int, bias: torch.Tensor | None, cut: int, device: torch.device) -> None:
    """A ``WeightOnly`` linear for every number of rows, and ``place`` where it has that, with ``bias`` and without;
    ``cut``: columns of out there."""
    for m in (*packed_tiles.BUCKETS, WIDE + 1):
        x = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
        for each in (None, bias) if bias is not None else (None,):
            packed.matmul(x, each)
            if packed.places and m <= MANY_ROWS:
                index = torch.full((m,), -1, dtype=torch.int64, device=device)
                rest = x.new_empty(ROWS, n - cut) if cut else None
                packed.place(x.new_empty(ROWS, cut or n), index, x, each, rest)


def quantise(source: str, k: int, fmt: str, device: torch.device, *, protects: bool) -> None:
    """``activations`` from ``source``, a name of ``quantize_rows``; with kept rows if the linear ``protects``."""
    x = torch.zeros(ROWS, 2 * k if source in ("silu", "gelu") else k, dtype=torch.bfloat16, device=device)
    slots = torch.full((ROWS,), -1, dtype=torch.int32, device=device)
    kept = x.new_empty(ROWS, k)
    for keeping in ({}, {"slots": slots, "kept": kept}) if protects else ({},):
        if source in ("norm", "zero_centred_norm"):
            zero_centred = source == "zero_centred_norm"
            for residual in (None, torch.zeros_like(x)):
                activations.rmsnorm(
                    x, x.new_zeros(k), 1e-6, fmt, zero_centred=zero_centred, residual=residual, **keeping
                )
        else:
            made = {"rows": activations.quantize, "silu": activations.silu_mul, "gelu": activations.gelu_mul}
            made[source](x, fmt, **keeping)
