#!/usr/bin/env python3
"""The kernels that quantise activations, against memory bandwidth and against what SGLang runs instead of them.

All are bound by memory, so the figure is the share of copy bandwidth: the bytes that a kernel must move, over its time,
over the best that copies reach on the same machine (1 GiB by ``copy_``, and 8192 rows as an arm), and over what a copy
of the same [M, K] reaches: the start and end of a kernel weigh more in a short one.  Each arm works on rotating sets of
random data, inputs and outputs together several times the L2 cache; its calls are captured in one CUDA graph, and the
time of a call is the median over replays, divided by the number of sets.  Arms of two kernels count the bytes of one
fused kernel: their share is that of the work, and can be compared.

SGLang's own SiLU kernel is compiled by nvcc at first use; it takes part with --jit, sgl_kernel's always.
With --invariant it times FP8 GEMMs instead, by linear: the one of deterministic inference, and those that are tuned.
--around: what is between qkv_proj and attention instead (bench/around.py), whose kernels nvcc compiles too.
Prints a table; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton

from mixquant_sglang.kernels.limits import MANY_ROWS
from mixquant_sglang.kernels.triton import activations, invariant
from mixquant_sglang.kernels.triton.few_rows import linear_rows_
from mixquant_sglang.kernels.tuning import fp8_gemm
from scripts.bench.around import around
from scripts.bench.servers import machine

EPS = 1e-6
# bytes for each element of what the format makes, scales of rows left out
WRITTEN = {"fp8": 1, "nvfp4": 0.5 + 1 / 16, "qdq": 2}
Call = Callable[[], Any]


@dataclass(frozen=True)
class Arm:
    name: str
    m: int
    k: int
    bytes_per_element: float  # of the K columns that come out
    make: Callable[[], Call]  # fresh data, and the call that works on it


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def per_token_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)
    torch.ops.sgl_kernel.sgl_per_token_quant_fp8.default(x, codes, scales)
    return codes, scales


def sgl_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Overwrites ``x`` with the norm, so ``x`` grows no further over the replays than a norm is large."""
    torch.ops.sgl_kernel.fused_add_rmsnorm.default(x, residual, weight, EPS, False)
    return x


def sgl_silu(gate_up: torch.Tensor) -> torch.Tensor:
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    torch.ops.sgl_kernel.silu_and_mul.default(out, gate_up)
    return out


def jit_silu(gate_up: torch.Tensor) -> torch.Tensor:
    from sglang.kernels.ops.activation.activation import silu_and_mul

    return silu_and_mul(gate_up)  # type: ignore[no-any-return]


def arms_of_rows(m: int, k: int) -> Iterator[Arm]:
    """On plain rows [M, K]."""

    def over(function: Callable[[torch.Tensor], Any]) -> Callable[[], Call]:
        def make() -> Call:
            x = randn(m, k)
            return lambda: function(x)

        return make

    yield Arm("copy", m, k, 4, over(torch.clone))
    for fmt, written in WRITTEN.items():

        def quantize(x: torch.Tensor, fmt: str = fmt) -> Any:
            return activations.quantize(x, fmt)

        yield Arm(f"quantize {fmt}", m, k, 2 + written, over(quantize))
    yield Arm("sgl per_token_quant_fp8", m, k, 3, over(per_token_fp8))


def arms_of_norm(m: int, k: int) -> Iterator[Arm]:
    """On rows [M, K] with a residual."""
    weight = randn(k)

    def over(function: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[], Call]:
        def make() -> Call:
            x, residual = randn(m, k), randn(m, k)
            return lambda: function(x, residual)

        return make

    for fmt, written in WRITTEN.items():

        def fused(x: torch.Tensor, residual: torch.Tensor, fmt: str = fmt) -> Any:
            return activations.rmsnorm(x, weight, EPS, fmt, residual=residual)

        yield Arm(f"rmsnorm {fmt}", m, k, 6 + written, over(fused))
    yield Arm("sgl rmsnorm", m, k, 8, over(lambda x, residual: sgl_norm(x, residual, weight)))
    yield Arm("sgl rmsnorm, then fp8", m, k, 7, over(lambda x, residual: per_token_fp8(sgl_norm(x, residual, weight))))


def arms_of_silu(m: int, k: int, jit: bool) -> Iterator[Arm]:
    """On gate and up [M, 2*K]."""

    def over(function: Callable[[torch.Tensor], Any]) -> Callable[[], Call]:
        def make() -> Call:
            gate_up = randn(m, 2 * k)
            return lambda: function(gate_up)

        return make

    for fmt, written in WRITTEN.items():

        def fused(x: torch.Tensor, fmt: str = fmt) -> Any:
            return activations.silu_mul(x, fmt)

        yield Arm(f"silu_mul {fmt}", m, k, 4 + written, over(fused))
    for name, silu in [("sgl silu", sgl_silu)] + [("sglang jit silu", jit_silu)] * jit:

        def apart(x: torch.Tensor, silu: Callable[[torch.Tensor], torch.Tensor] = silu) -> Any:
            return per_token_fp8(silu(x))

        yield Arm(name, m, k, 6, over(silu))
        yield Arm(f"{name}, then fp8", m, k, 5, over(apart))


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def microseconds(arm: Arm, working_set: int, replays: int) -> float:
    calls = [arm.make() for _ in range(max(2, -(-working_set // int(arm.m * arm.k * arm.bytes_per_element))))]
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]  # all alive at once, so that each has memory of its own
    times: list[float] = []
    for _ in range(replays + 3):
        began, ended = (event() for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / len(calls))
    del results
    return statistics.median(times[3:])


def _of_bytes(working_set: int, replays: int, moved: int, make: Callable[[], Call]) -> float:
    return microseconds(Arm("", moved, 1, 1, make), working_set, replays)


def copy_bandwidth(working_set: int, replays: int) -> float:
    """GB/s, read and written."""
    source = randn(1 << 29)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(replays + 3):
        began, ended = (event() for _ in range(2))
        began.record()
        target.copy_(source)
        ended.record()
        ended.synchronize()
        best = max(best, 2 * source.nbytes / began.elapsed_time(ended) / 1e6)
    arm = next(arms_of_rows(8192, 12288))
    return max(best, arm.m * arm.k * arm.bytes_per_element / microseconds(arm, working_set, replays) / 1e3)


LAYER = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))  # the linears of Qwen3-8B


def protected_rows(counts: list[int], working_set: int, replays: int) -> list[dict[str, Any]]:
    """Microseconds of a layer's BF16 linears for so many protected rows, as a captured graph of 256 slots has them, and
    as cuBLAS and a copy have them, which know how many there are."""
    tokens, found = 512, []
    print(
        f"{'protected rows':>14}{'few_rows':>10}{'GB/s':>7}{'cuBLAS':>9}   us of a layer, by linear: few_rows (cuBLAS)"
    )
    for count in counts:
        index = torch.full((MANY_ROWS,), -1, device="cuda")
        index[:count] = torch.randperm(tokens, device="cuda")[:count]

        def few(n: int, k: int, index: torch.Tensor = index) -> Call:
            out, rows, weight = randn(tokens, n), randn(MANY_ROWS, k), randn(n, k)
            return lambda: linear_rows_(out, index, rows, weight)

        def cublas(n: int, k: int, used: torch.Tensor = index[:count]) -> Call:
            out, rows, weight = randn(tokens, n), randn(len(used), k), randn(n, k)
            return lambda: out.index_copy_(0, used, torch.nn.functional.linear(rows, weight))

        us = [
            [microseconds(Arm(name, n, k, 2, partial(make, n, k)), working_set, replays) for n, k in LAYER]
            for name, make in (("few_rows", few), ("cublas", cublas))
        ]
        total, other = sum(us[0]), sum(us[1])
        each = "  ".join(f"{a:.1f} ({b:.1f})" for a, b in zip(*us, strict=True))
        gbs = sum(2 * n * k for n, k in LAYER) / total / 1e3
        print(f"{count:>14}{total:>10.1f}{gbs:>7.0f}{other:>9.1f}   {each}", flush=True)
        found.append({"rows": count, "few_rows_us": us[0], "cublas_us": us[1]})
    return found


def invariant_gemm(counts: list[int], working_set: int, replays: int) -> list[dict[str, Any]]:
    """Microseconds of a layer's FP8 linears by the GEMM of deterministic inference, and by each that is chosen from
    without it, of which the table has the fastest of each linear."""
    gemms = {"invariant": invariant.scaled_mm, **fp8_gemm.CANDIDATES}
    found = []
    print(f"{'rows':>6}{'invariant':>11}{'TFLOP/s':>9}{'tuned':>9}{'TFLOP/s':>9}   us by linear: invariant (tuned)")
    for m in counts:

        def make(n: int, k: int, name: str, m: int = m) -> Call:
            (xq, sx), (wq, sw) = per_token_fp8(randn(m, k)), per_token_fp8(randn(n, k))
            return lambda: gemms[name](xq, wq, sx, sw[:, 0], None)

        us = {
            name: [microseconds(Arm(name, n, k, 1, partial(make, n, k, name)), working_set, replays) for n, k in LAYER]
            for name in gemms
        }
        tuned = [min(times) for times in zip(*(us[name] for name in fp8_gemm.CANDIDATES), strict=True)]
        flop = 2 * m * sum(n * k for n, k in LAYER)
        ours, best = sum(us["invariant"]), sum(tuned)
        totals = f"{ours:>11.1f}{flop / ours / 1e6:>9.0f}{best:>9.1f}{flop / best / 1e6:>9.0f}"
        each = "  ".join(f"{a:.1f} ({b:.1f})" for a, b in zip(us["invariant"], tuned, strict=True))
        print(f"{m:>6}{totals}   {each}", flush=True)
        found.append({"rows": m, "us": us})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--hidden", type=int, default=4096, help="K of the norms")
    parser.add_argument("--intermediate", type=int, default=12288, help="K of the SiLU")
    parser.add_argument("--only", nargs="+", default=[""], help="arms whose name contains one of these, 'nvfp4' say")
    parser.add_argument("--jit", action="store_true", help="SGLang's own SiLU kernel too")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument(
        "--working-set", type=int, default=256 << 20, help="bytes that the sets of an arm have at least"
    )
    parser.add_argument("--protected", nargs="+", type=int, help="numbers of protected rows: their BF16 linears alone")
    parser.add_argument("--around", action="store_true", help="norms of heads, RoPE and the write of the cache alone")
    parser.add_argument("--invariant", action="store_true", help="the FP8 GEMM of deterministic inference alone")
    args = parser.parse_args()
    if args.around:
        torch.manual_seed(0)
        found = around(args.rows, partial(_of_bytes, args.working_set, args.replays))
        print(json.dumps({**machine(), "triton": triton.__version__, "around": found}))
        return
    if args.invariant:
        import sgl_kernel

        torch.manual_seed(0)
        gemms = invariant_gemm(args.rows, args.working_set, args.replays)
        print(json.dumps({**machine(), "triton": triton.__version__, "invariant": gemms}))
        return
    if args.protected:
        torch.manual_seed(0)
        found = protected_rows(args.protected, args.working_set, args.replays)
        print(json.dumps({**machine(), "protected": found}))
        return
    import sgl_kernel  # noqa: F401 - registers its operators

    torch.manual_seed(0)
    copy = copy_bandwidth(args.working_set, args.replays)
    print(f"copy bandwidth {copy:.0f} GB/s")
    print(f"{'kernel':<26}{'M':>7}{'K':>7}{'us':>9}{'MB':>8}{'GB/s':>7}{'share':>7}{'of same size':>14}")
    rows = []
    same: dict[tuple[int, int], float] = {}
    for m in args.rows:
        arms = [
            *arms_of_rows(m, args.hidden),
            *arms_of_norm(m, args.hidden),
            *arms_of_rows(m, args.intermediate),
            *arms_of_silu(m, args.intermediate, args.jit),
        ]
        for arm in arms:
            if arm.name != "copy" and not any(part in arm.name for part in args.only):
                continue
            us = microseconds(arm, args.working_set, args.replays)
            moved = arm.m * arm.k * arm.bytes_per_element
            gbs = moved / us / 1e3
            if arm.name == "copy":
                same[arm.m, arm.k] = gbs
            share, of_same = gbs / copy, gbs / same[arm.m, arm.k]
            print(
                f"{arm.name:<26}{arm.m:>7}{arm.k:>7}{us:>9.1f}{moved / 1e6:>8.1f}{gbs:>7.0f}{share:>7.0%}"
                f"{of_same:>14.0%}",
                flush=True,
            )
            row = {"kernel": arm.name, "m": arm.m, "k": arm.k, "us": us, "bytes": moved}
            rows.append({**row, "share": share, "share_of_same_size": of_same})
    print(json.dumps({**machine(), "triton": triton.__version__, "copy_gbs": copy, "arms": rows}))


def command() -> None:
    main()
