"""Packed weights as benchmarks make and time them, and how far their products may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mixquant_sglang.formats import fp8, nvfp4
from mixquant_sglang.kernels.packing import quantize_nvfp4
from mixquant_sglang.kernels.triton import packed_tiles
from mixquant_sglang.kernels.triton.packed_rows import Packed

SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))  # Qwen3-8B
WORKING_SET = 512 << 20  # bytes that the weights of an arm have at least


def packed(fmt: str, weight: torch.Tensor) -> Packed:
    locks = torch.zeros(packed_tiles.LOCKS, dtype=torch.int32, device="cuda")
    if fmt == "w8a16":
        q = fp8.quantize(weight)
        return Packed(q.data, q.scales, locks)
    p = quantize_nvfp4(weight)
    return Packed(p.packed, p.tensor_scale, locks, p.block_scales)


def exact(weight: Packed) -> torch.Tensor:
    """Its values in float64."""
    if weight.block_scales is None:
        return weight.codes.double() * weight.scale[:, None].double()
    return (
        nvfp4.NVFP4Tensor(weight.codes, weight.block_scales, weight.scale).unscaled(torch.float64)
        * weight.scale.double()
    )


def allowed(x: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and what FP32 sums and one rounding may be off."""
    want = x.double() @ values.t()
    return want, want.abs() * 2**-8 + 2**-20 * (x.double().abs() @ values.t().abs())


def errors(out: torch.Tensor, want: torch.Tensor, may: torch.Tensor) -> float:
    """The largest, in units of ``may``; infinite where a number is none."""
    off = (out.double() - want).abs() / may.clamp(min=1e-30)
    return float(torch.where(off.isnan(), math.inf, off).max())


def microseconds(calls: Sequence[Callable[[], Any]], replays: int) -> float:
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    event = partial(torch.cuda.Event, enable_timing=True)
    for _ in range(replays + 2):
        began, ended = (event() for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / len(calls))
    return statistics.median(times[2:])


def rotating(nbytes: int) -> int:
    return max(2, -(-WORKING_SET // nbytes))
