"""``bench_packed --placed``: protected rows in the slots of a captured prefill graph, of which few are used.

For each weight and number of used slots: microseconds of BF16 rows and weights (``few_rows.py``, what recipes that keep
BF16 weights run), and of each form of ``packed_rows.WALK``: by 64; programs that go over the used slots up to 8, 16 or
32 at a time. The graph has 256 slots and goes over weights that do not fit the L2 cache. First, in a graph that was
captured with no slot used, every form is compared with float64, nothing but the used places may be written, and all but
by 64 must have the bits of each row alone.

The last rows are a layer's four weights together, and 36 such layers: what a pass of Qwen3-8B spends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from mixquant_sglang.kernels.limits import MANY_ROWS
from mixquant_sglang.kernels.triton import few_rows, packed_rows, packed_tiles
from mixquant_sglang.kernels.triton.packed_rows import Packed
from scripts.bench.packed_weights import SHAPES, allowed, errors, exact, microseconds, packed, rotating

FORMS = {"by 64": 0, "walk 8": 8, "walk 16": 16, "walk 32": 32}  # ``packed_rows.WALK``
USED = (0, 1, 8, 16, 32, 64)
TOKENS, LAYERS = 512, 36


@contextmanager
def form(walk: int) -> Iterator[None]:
    before = packed_rows.WALK
    packed_rows.WALK = walk
    try:
        yield
    finally:
        packed_rows.WALK = before


def slots(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and an index in which none is used."""
    rows = torch.randn(MANY_ROWS, k, dtype=torch.bfloat16, device="cuda")
    return rows, torch.full((MANY_ROWS,), -1, dtype=torch.int64, device="cuda")


def use(index: torch.Tensor, used: int) -> torch.Tensor:
    """Fills the first slots with places in no order; returns these."""
    places = torch.randperm(TOKENS, device="cuda")[:used]
    index.fill_(-1)
    index[:used] = places
    return places


def check(fmt: str, weight: Packed) -> float:
    """The largest error of all forms, in units of what FP32 sums and one rounding may be off."""
    (n, k), worst = weight.shape, 0.0
    rows, index = slots(k)
    want, may = allowed(rows, exact(weight))
    alone = torch.cat([packed_rows.linear_rows(row, weight) for row in torch.split(rows, 1)])
    for name, walk in FORMS.items():
        out = torch.full((TOKENS, n), math.nan, dtype=torch.bfloat16, device="cuda")
        index.fill_(-1)
        with form(walk):
            packed_rows.linear_rows(rows, weight, out=out, index=index)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                packed_rows.linear_rows(rows, weight, out=out, index=index)
        for used in (*USED, 9, 17, 65, MANY_ROWS):
            out.fill_(math.nan)
            places = use(index, used)
            graph.replay()
            found = out[places]
            out[places] = math.nan
            what = f"{fmt} [{n}, {k}], {name}, {used} of {MANY_ROWS} slots"
            if not bool(out.isnan().all()):
                raise SystemExit(f"{what}: other rows were written")
            off = errors(found, want[:used], may[:used]) if used else 0.0
            if not off <= 1:
                raise SystemExit(f"{what}: {off:.3g} times what it may be off")
            if walk and not torch.equal(found, alone[:used]):
                raise SystemExit(f"{what}: not the bits of each row alone")
            worst = max(worst, off)
    return worst


def timed(run: Callable[..., Any], weights: Sequence[Any], k: int, n: int, replays: int) -> dict[int, float]:
    """Microseconds of one ``run(out, index, rows, weight)`` in one captured graph, by used slots."""
    rows, index = slots(k)
    out = torch.empty(TOKENS, n, dtype=torch.bfloat16, device="cuda")
    found = {}
    for used in USED:
        use(index, used)
        found[used] = microseconds([partial(run, out, index, rows, weight) for weight in weights], replays)
    return found


def packed_run(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, weight: Packed) -> None:
    packed_rows.linear_rows(rows, weight, out=out, index=index)


def measure(fmt: str, n: int, k: int, replays: int) -> dict[str, dict[int, float]]:
    base = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(rotating(2 * n * k))]
    found = {"bf16": timed(few_rows.linear_rows_, base, k, n, replays)}
    first = packed(fmt, base[0])
    size = first.codes.nbytes + (0 if first.block_scales is None else first.block_scales.nbytes)
    weights = [packed(fmt, base[i % len(base)]) for i in range(rotating(size))]
    print(f"{fmt} [{n}, {k}] agrees with float64: {check(fmt, first):.2f} of what it may be off", flush=True)
    for name, walk in FORMS.items():
        with form(walk):
            found[name] = timed(packed_run, weights, k, n, replays)
    return found


def main(formats: Sequence[str], replays: int) -> None:
    if not packed_tiles.STRAIGHT:
        raise SystemExit("with this Triton the kernel of few rows does not serve: nothing walks")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds, {MANY_ROWS} slots in a graph")
    arms: list[dict[str, Any]] = []
    names = ("bf16", *FORMS)
    head = f"{'':<6}{'weight':>15}{'used':>6}" + "".join(f"{name:>10}" for name in names)
    for fmt in formats:
        found = {(n, k): measure(fmt, n, k, replays) for n, k in SHAPES}
        print(head)
        for (n, k), times in found.items():
            for used in USED:
                us = {name: times[name][used] for name in names}
                arms.append({"format": fmt, "n": n, "k": k, "used": used} | us)
                print(f"{fmt:<6}{f'{k}->{n}':>15}{used:>6}" + "".join(f"{us[name]:>10.1f}" for name in names))
        for used in USED:
            layer = {name: sum(times[name][used] for times in found.values()) for name in names}
            print(f"{fmt:<6}{'a layer':>15}{used:>6}" + "".join(f"{layer[name]:>10.1f}" for name in names))
            said = "".join(f"{layer[name] * LAYERS / 1e3:>10.2f}" for name in names)
            print(f"{fmt:<6}{f'{LAYERS} layers, ms':>15}{used:>6}{said}", flush=True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "slots": MANY_ROWS, "placed": arms}))
