#!/usr/bin/env python3
"""Linears of BF16 rows and packed weights (W8A16, W4A16) against torch's BF16 matmul and the limit of memory.

For each weight [N, K] and number of rows M: microseconds of BF16; of reading the packed bytes at copy bandwidth; of
what serves (``kernels/triton/packed_rows.py``); and of the other way, all weights unpacked to BF16 just in time for
cuBLAS. Weights rotate over several times the L2 cache, and the calls are captured in one CUDA graph. First every kernel
is compared with float64 on all codes. The last rows are the sums of all weights.

--sweep tries both kernels with lists of tiles (``packed_sweep.py``), and ends with the lines of
``packed_tiles.CHOICES``: copy these. --marlin adds SGLang's Marlin, whose weights are a second copy in a layout of its
own (``packed_marlin.py``). --placed times something else: protected rows in the slots of a captured prefill graph
(``packed_placed.py``). So does --experts: those of a mixture (``packed_experts.py``).

Prints a table; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton

from mixquant_sglang.kernels.triton import packed_rows
from mixquant_sglang.kernels.triton.packed_rows import Packed
from mixquant_sglang.kernels.triton.packed_tiles import Tiles, Warps
from mixquant_sglang.kernels.triton.unpack import unscaled
from scripts.bench import packed_experts, packed_marlin, packed_placed, packed_sweep
from scripts.bench.packed_weights import SHAPES, allowed, errors, exact, microseconds, packed, rotating

ROWS = (1, 8, 16, 32, 64, 128, 256)


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
                want, may = allowed(x, values)
                for tiles in (None, Tiles(32, 256, 2, 3, 2), Tiles(64, 128, 4, 4, 4), Warps(16, 2, 8), Warps(32, 1, 4)):
                    for _ in range(3):
                        out = packed_rows.linear_rows(x, weight, tiles=tiles)
                        off = errors(out, want, may)
                        if not off <= 1:
                            raise SystemExit(f"{fmt} [{n}, {k}], {m} rows, {tiles}: {off:.3g} times what it may be off")
                        worst = max(worst, off)
                    alone = packed_rows.linear_rows(x[:1].contiguous(), weight, tiles=tiles)
                    bucket = packed_sweep.bucket_of(m)
                    if bucket == packed_sweep.bucket_of(1) and not torch.equal(alone, out[:1]):
                        raise SystemExit(f"{fmt} [{n}, {k}]: a row depends on the others among {m}")
                if weight.locks.any():
                    raise SystemExit(f"{fmt} [{n}, {k}]: locks are left")
    return worst


def bandwidth() -> float:
    """GB/s, read and written, of a kernel that does next to nothing else; a copy within a graph is slower."""
    source = torch.empty(1 << 28, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    us = microseconds([lambda: torch.bitwise_not(source, out=target)], 10)
    return 2 * source.nbytes / us / 1e3


def ours(x: torch.Tensor, weights: list[Packed], tiles: Tiles | Warps | None, args: Any) -> float:
    return microseconds([partial(packed_rows.linear_rows, x, w, tiles=tiles) for w in weights], args.replays)


def measure(
    n: int, k: int, rows: tuple[int, ...], args: Any, gbs: float, sweep: packed_sweep.Sweep
) -> Iterator[dict[str, Any]]:
    base = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(rotating(2 * n * k))]
    bf16 = {}
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        bf16[m] = microseconds([partial(torch.mm, x, w.t()) for w in base], args.replays)
    for fmt in args.formats:
        first = packed(fmt, base[0])
        size = first.codes.nbytes + (0 if first.block_scales is None else first.block_scales.nbytes)
        weights = [packed(fmt, base[i % len(base)]) for i in range(rotating(size))]
        marlin = packed_marlin.products(weights) if args.marlin else []
        if marlin:
            packed_marlin.check(marlin[0], exact(first), f"{fmt} [{n}, {k}]")
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
            if args.marlin:
                row["marlin"] = microseconds([partial(product, x) for product in marlin], args.replays)
            if args.sweep:
                tried = swept(x, weights, n, k, args)
                sweep.note(fmt == "w4a16", m, n, k, tried)
                best = sorted(tried, key=lambda tiles: tried[tiles])[:4]
                row["best"] = {f"{type(tiles).__name__}{tuple(tiles)}": round(tried[tiles], 2) for tiles in best}
            yield row


def swept(x: torch.Tensor, weights: list[Packed], n: int, k: int, args: Any) -> dict[Tiles | Warps, float]:
    """Microseconds of everything that is tried. What does not fit the GPU is left out; a wrong number ends it all."""
    want, may = allowed(x, exact(weights[0]))
    found: dict[Tiles | Warps, float] = {}
    for tiles in packed_sweep.launches(packed_sweep.bucket_of(len(x)), n, k):
        try:
            off = errors(packed_rows.linear_rows(x, weights[0], tiles=tiles), want, may)
            if not off <= 1:
                raise SystemExit(f"[{n}, {k}], {len(x)} rows, {tiles}: {off:.3g} times what it may be off")
            found[tiles] = ours(x, weights, tiles, args)
        except triton.runtime.errors.OutOfResources:
            print(f"  [{n}, {k}], {len(x)} rows: {tiles} does not fit this GPU", flush=True)
    return found


def together(found: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of all weights together, by format and rows."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["format"], row["m"]), []).append(row)
    for (fmt, m), rows in groups.items():
        bf16, said = sum(row["bf16"] for row in rows), ""
        for arm in ("ours", "marlin", "widened"):
            if all(arm in row for row in rows):
                us = sum(row[arm] for row in rows)
                said += f"  {arm} {us:.1f} ({bf16 / us:.2f}x)"
        yield f"{fmt} {m:>4} rows, {len(rows)} weights: bf16 {bf16:.1f}{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--formats", nargs="+", default=["w8a16", "w4a16"])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sweep", action="store_true", help="time lists of tiles too, and say which should serve")
    parser.add_argument(
        "--marlin", action="store_true", help="time SGLang's Marlin too, on a second copy of the weights"
    )
    what.add_argument("--experts", action="store_true", help="time experts of few rows, alone")
    what.add_argument("--placed", action="store_true", help="time protected rows in the slots of a graph, alone")
    parser.add_argument("--replays", type=int, default=7)
    args = parser.parse_args()
    if (args.experts or args.placed) and (args.marlin or args.rows is not ROWS):
        parser.error("--experts and --placed have rows of their own, and no --marlin")
    if args.experts:
        packed_experts.main(args.formats, args.replays)
        return
    if args.placed:
        packed_placed.main(args.formats, args.replays)
        return
    if args.sweep:
        begin = time.perf_counter()
        launched = packed_sweep.compile_ahead(args.formats, args.rows, SHAPES)
        print(f"compiled {launched} launches ahead in {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"all codes and shapes agree with float64: at most {check():.2f} of what they may be off", flush=True)
    gbs = bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {gbs:.0f} GB/s; microseconds")
    head = (
        ("weight", 15),
        ("M", 5),
        ("bf16", 8),
        ("limit", 7),
        ("ours", 8),
        ("share", 7),
        ("x bf16", 8),
        ("widened", 9),
        ("marlin", 8),
    )
    print(" " * 6 + "".join(f"{name:>{width}}" for name, width in head) + "  best tiles")
    found, sweep = [], packed_sweep.Sweep()
    for n, k in SHAPES:
        for row in measure(n, k, tuple(args.rows), args, gbs, sweep):
            found.append(row)
            best = "; ".join(f"{tiles}: {us:.1f}" for tiles, us in list(row.get("best", {}).items())[:2])
            limit, own, other = row["limit"], row["ours"], row.get("widened", 0.0)
            line = f"{row['format']:<6}{f'{k}->{n}':>15}{row['m']:>5}{row['bf16']:>8.1f}{limit:>7.1f}{own:>8.1f}"
            line += f"{limit / own:>7.0%}{row['bf16'] / own:>8.2f}{other:>9.1f}{row.get('marlin', 0.0):>8.1f}  {best}"
            print(line, flush=True)
    for line in together(found):
        print(line)
    if args.sweep:
        print("CHOICES of packed_tiles.py:")
    for line in sweep.lines():
        print(line)
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gbs": gbs, "arms": found}))


def command() -> None:
    main()
