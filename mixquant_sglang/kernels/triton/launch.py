"""Launches the kernels of ``row_kernels.py``: results, grid, warps."""

import functools

import torch
import triton

from mixquant_sglang.kernels.limits import BLOCK
from mixquant_sglang.kernels.triton.checks import capability, require
from mixquant_sglang.kernels.triton.compiled import Compiled
from mixquant_sglang.kernels.triton.row_kernels import quantize_pairs, quantize_rows

FORMATS = ("fp8", "nvfp4", "qdq")


def launch(
    source: str,
    fmt: str,
    x: torch.Tensor,
    k: int,
    *,
    weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 0.0,
    slots: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    m = x.shape[0]
    if k == 0 or k % BLOCK:
        raise ValueError(f"K must be a positive multiple of {BLOCK}, got {k}")
    if slots is not None and kept is not None:
        require(slots, "slots", (m,), torch.int32)
        require(kept, "kept", ("R", k))
    elif slots is not None or kept is not None:
        raise ValueError("slots and kept must be given together")
    device = x.device
    results = empty_results(fmt, m, k, device)
    programs, words = m, results
    if fmt == "nvfp4":  # the programs beyond M zero the padding; eight codes are one word
        programs, words = results[1].shape[0], (results[0].view(torch.int32), results[1].view(torch.uint8), results[2])
    if m == 0:
        return results
    pairs = source == "rows" and fmt == "nvfp4"
    warps, split = (warps_of_pairs(k), True) if pairs else shape_of(source, fmt, k)
    pointers = x.data_ptr()
    for tensor in (weight, residual, slots, kept, *words):
        if tensor is not None:
            pointers |= tensor.data_ptr()
    kind = (device.index, source, fmt, k, weight is None, residual is None, slots is None)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    if pairs:
        arguments: tuple[object, ...] = (x, slots, kept, *words, m)
        grid, constants = (programs // 2, 1, 1), (k, 32 * warps, sm(device))
        _pairs.launch(quantize_pairs, kind, pointers, grid, arguments, constants, options)
    else:
        outputs = (*words, None, None)[:3]
        arguments = (x, weight, residual, slots, kept, *outputs, m, eps)
        of_row = (k, 32 * warps, split, source, fmt, sm(device))
        _rows.launch(quantize_rows, kind, pointers, (programs, 1, 1), arguments, of_row, options)
    return results


_rows, _pairs = Compiled(), Compiled()


@functools.cache
def shape_of(source: str, fmt: str, k: int) -> tuple[int, bool]:
    """Warps of a program, and whether its rows are SPLIT: the fastest on an H200 for 8192 rows of 4096 and 12288."""
    split = fmt == "nvfp4" and source in ("silu", "gelu")
    warps: int = triton.next_power_of_2(triton.cdiv(k, 32 * (96 if split else 32)))
    return min(warps, 32), split


@functools.cache
def warps_of_pairs(k: int) -> int:
    """The fastest on an H200 for 8192 rows of 4096 and 12288."""
    least, most = (int(triton.next_power_of_2(triton.cdiv(k, 32 * elements))) for elements in (96, 32))
    return max(min(most, 4), min(least, 32))


def empty_results(fmt: str, m: int, k: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {', '.join(map(repr, FORMATS))}, got {fmt!r}")
    if fmt == "qdq":
        return (torch.empty((m, k), dtype=torch.bfloat16, device=device),)
    if fmt == "nvfp4":
        packed = torch.empty((m, k // 2), dtype=torch.uint8, device=device)
        tiles = (triton.cdiv(m, 128) * 128, triton.cdiv(k, 64) * 4)
        scales = torch.empty(tiles, dtype=torch.float8_e4m3fn, device=device)
        return packed, scales, torch.empty((m,), dtype=torch.float32, device=device)
    if device.type == "cuda" and capability(device) < (8, 9):
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or newer, got {capability(device)}")
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty((m, 1), dtype=torch.float32, device=device)


def sm(device: torch.device) -> int:
    """As in ``sm_90``; 0 for Triton's interpreter, which has no inline PTX."""
    major, minor = capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor
