#!/usr/bin/env python3
"""Linears of BF16 rows and packed weights (W8A16, W4A16) against torch's BF16 matmul and the limit of memory.

For each weight [N, K] and number of rows M: microseconds of BF16; of reading the packed bytes at copy bandwidth; of
the kernel with the tiles that serve (``kernels/triton/packed_rows.py``); with --sweep of the best tiles of a list; and
of the other way, all weights unpacked to BF16 just in time for cuBLAS. Weights rotate over several times the L2 cache,
and the calls are captured in one CUDA graph. First every kernel is compared with float64 on all codes.

Prints a table; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton

from mixquant_sglang.formats import fp8, nvfp4
from mixquant_sglang.kernels.packing import quantize_nvfp4
from mixquant_sglang.kernels.triton import packed_rows, packed_tiles
from mixquant_sglang.kernels.triton.packed_rows import Packed
from mixquant_sglang.kernels.triton.packed_tiles import Tiles
from mixquant_sglang.kernels.triton.unpack import unscaled

SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))  # Qwen3-8B
ROWS = (1, 8, 16, 32, 64, 128, 256)
WORKING_SET = 512 << 20  # bytes that the weights of an arm have at least

SWEEP = {
    16: [
        *(Tiles(16, 256, 1, 6, 4), Tiles(16, 512, 1, 4, 4), Tiles(16, 512, 2, 4, 2)),
        *(Tiles(32, 128, 1, 6, 4), Tiles(32, 256, 1, 4, 4), Tiles(32, 256, 2, 4, 4), Tiles(32, 512, 1, 4, 4)),
        *(Tiles(32, 256, 1, 5, 2), Tiles(32, 256, 2, 4, 2), Tiles(32, 256, 4, 4, 2), Tiles(32, 512, 2, 3, 2)),
        *(Tiles(64, 128, 1, 5, 4), Tiles(64, 128, 2, 5, 4), Tiles(64, 128, 4, 5, 4), Tiles(64, 128, 8, 5, 4)),
        *(Tiles(64, 256, 1, 4, 4), Tiles(64, 256, 2, 4, 4), Tiles(64, 256, 4, 4, 4)),
        *(Tiles(128, 128, 1, 4, 8), Tiles(128, 128, 2, 4, 8), Tiles(128, 128, 4, 4, 8)),
    ],
    64: [
        *(Tiles(32, 128, 1, 5, 4), Tiles(32, 256, 1, 3, 4), Tiles(32, 256, 2, 3, 2), Tiles(32, 128, 2, 5, 2)),
        *(Tiles(64, 64, 1, 6, 4), Tiles(64, 128, 1, 4, 4), Tiles(64, 128, 2, 4, 4), Tiles(64, 128, 4, 4, 4)),
        *(Tiles(64, 256, 1, 3, 4), Tiles(64, 256, 2, 3, 4), Tiles(128, 64, 2, 5, 8)),
        *(Tiles(128, 128, 1, 3, 8), Tiles(128, 128, 2, 3, 8), Tiles(128, 128, 4, 3, 8), Tiles(128, 128, 8, 3, 8)),
    ],
    128: [
        *(Tiles(64, 64, 1, 5, 4), Tiles(64, 64, 2, 5, 4), Tiles(64, 128, 1, 3, 4), Tiles(64, 128, 2, 3, 4)),
        *(Tiles(128, 64, 1, 4, 8), Tiles(128, 64, 2, 4, 8), Tiles(128, 64, 4, 4, 8), Tiles(128, 64, 1, 4, 4)),
        *(Tiles(128, 128, 1, 3, 8), Tiles(128, 128, 2, 3, 8), Tiles(128, 128, 4, 3, 8)),
    ],
}
SWEEP[8] = SWEEP[16]
SWEEP[32] = SWEEP[64]


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


def widened(x: torch.Tensor, weight: Packed) -> torch.Tensor:
    """The other way: unpack to BF16, cuBLAS with FP32 results, scales, one rounding."""
    wide = (
        weight.codes.to(torch.bfloat16) if weight.block_scales is None else unscaled(weight.codes, weight.block_scales)
    )
    return torch.mm(x, wide.t(), out_dtype=torch.float32).mul_(weight.scale).to(torch.bfloat16)


def check() -> float:
    """Compares all codes with float64; the largest error in units of what FP32 sums and one rounding may be off."""
    codes = torch.arange(256, device="cuda").to(torch.uint8)
    worst = 0.0
    for fmt in ("w8a16", "w4a16"):
        for n, k in ((256, 512), (4096, 4096), (1000, 1040)):
            torch.manual_seed(n)
            weight = packed(fmt, torch.randn(n, k, dtype=torch.bfloat16, device="cuda"))
            if n == 256:  # every code beside every other; not that of NaN
                finite = torch.where(codes & 0x7F == 0x7F, 0, codes) if fmt == "w8a16" else codes
                raw = weight.codes.view(torch.uint8)
                raw.copy_(finite[(torch.arange(n)[:, None] + torch.arange(raw.shape[1])[None]) % 256])
            for m in (1, 5, 16, 17, 64, 100, 128, 300):
                x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
                values = exact(weight)
                want = x.double() @ values.t()
                may = want.abs() * 2**-8 + 2**-20 * (x.double().abs() @ values.t().abs())
                for tiles in (None, Tiles(32, 256, 2, 3, 2), Tiles(64, 128, 4, 4, 4)):
                    for _ in range(3):
                        out = packed_rows.linear_rows(x, weight, tiles=tiles)
                        off = float(((out.double() - want).abs() / may.clamp(min=1e-30)).max())
                        if not off <= 1:
                            raise SystemExit(f"{fmt} [{n}, {k}], {m} rows, {tiles}: {off:.3g} times what it may be off")
                        worst = max(worst, off)
                    alone = packed_rows.linear_rows(x[:1].contiguous(), weight, tiles=tiles)
                    if m <= packed_tiles.BUCKETS[0] and not torch.equal(alone, out[:1]):
                        raise SystemExit(f"{fmt} [{n}, {k}]: a row depends on the others among {m}")
                if weight.locks.any():
                    raise SystemExit(f"{fmt} [{n}, {k}]: locks are left")
    return worst


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


def bandwidth() -> float:
    """GB/s of copies, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    us = microseconds([lambda: target.copy_(source)], 10)
    return 2 * source.nbytes / us / 1e3


def rotating(nbytes: int) -> int:
    return max(2, -(-WORKING_SET // nbytes))


def ours(x: torch.Tensor, weights: list[Packed], tiles: Tiles | None, args: Any) -> float:
    return microseconds([partial(packed_rows.linear_rows, x, w, tiles=tiles) for w in weights], args.replays)


def measure(n: int, k: int, rows: tuple[int, ...], args: Any, gbs: float) -> Iterator[dict[str, Any]]:
    base = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(rotating(2 * n * k))]
    bf16 = {}
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        bf16[m] = microseconds([partial(torch.mm, x, w.t()) for w in base], args.replays)
    for fmt in args.formats:
        first = packed(fmt, base[0])
        size = first.codes.nbytes + (0 if first.block_scales is None else first.block_scales.nbytes)
        weights = [packed(fmt, base[i % len(base)]) for i in range(rotating(size))]
        for m in rows:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            floor = (size + 2 * m * (n + k)) / gbs / 1e3
            row = {
                "format": fmt,
                "n": n,
                "k": k,
                "m": m,
                "bf16": bf16[m],
                "limit": floor,
                "ours": ours(x, weights, None, args),
            }
            if m >= 32:
                row["widened"] = microseconds([partial(widened, x, w) for w in weights], args.replays)
            if args.sweep:
                bucket = next((b for b in packed_tiles.BUCKETS if b >= m), packed_tiles.BUCKETS[-1])
                tried: dict[Tiles, float] = {}
                for tiles in SWEEP[bucket]:
                    try:
                        tried[tiles] = ours(x, weights, tiles, args)
                    except triton.runtime.errors.OutOfResources:
                        continue
                best = sorted(tried, key=lambda tiles: tried[tiles])[:4]
                row["best"] = {",".join(map(str, tiles)): round(tried[tiles], 2) for tiles in best}
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--formats", nargs="+", default=["w8a16", "w4a16"])
    parser.add_argument("--sweep", action="store_true", help="time a list of tiles too")
    parser.add_argument("--replays", type=int, default=7)
    args = parser.parse_args()
    print(f"all codes and shapes agree with float64: at most {check():.2f} of what they may be off", flush=True)
    gbs = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {gbs:.0f} GB/s; microseconds")
    head = ("weight", 15), ("M", 5), ("bf16", 8), ("limit", 7), ("ours", 8), ("share", 7), ("x bf16", 8), ("widened", 9)
    print(" " * 6 + "".join(f"{name:>{width}}" for name, width in head) + "  best tiles")
    found = []
    for n, k in SHAPES:
        for row in measure(n, k, tuple(args.rows), args, gbs):
            found.append(row)
            best = "; ".join(f"{tiles}: {us:.1f}" for tiles, us in list(row.get("best", {}).items())[:2])
            limit, own, other = row["limit"], row["ours"], row.get("widened", 0.0)
            line = f"{row['format']:<6}{f'{k}->{n}':>15}{row['m']:>5}{row['bf16']:>8.1f}{limit:>7.1f}{own:>8.1f}"
            line += f"{limit / own:>7.0%}{row['bf16'] / own:>8.2f}{other:>9.1f}  {best}"
            print(line, flush=True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gbs": gbs, "arms": found}))


def command() -> None:
    main()
