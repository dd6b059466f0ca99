"""``bench_packed --experts``: experts of few BF16 rows and packed weights.

Microseconds for the experts of a layer, of Qwen3-30B-A3B's dimensions, routed at random, by rows, and by used slots of
64 as a captured prefill graph has them: ``expert_warps.py``, ``expert_rows.py`` (what serves with SGLang 0.5.23's
Triton), and rows sorted by expert (``grouped.py``).  Each call has weights of its own, ten layers of them, in one
graph.  First each is compared with ``expert_rows.py``, and a row with itself alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton

from mixquant_sglang.kernels.experts.base import Form, Masters
from mixquant_sglang.kernels.experts.emulated import Emulated, EmulatedFP8Experts, EmulatedNVFP4Experts
from mixquant_sglang.kernels.experts.weight_only import NativeW4A16Experts, NativeW8A16Experts, WeightOnlyExperts
from mixquant_sglang.kernels.limits import FEW_ROWS
from mixquant_sglang.kernels.triton.expert_rows import matrix_rows_
from mixquant_sglang.kernels.triton.expert_warps import serves, warp_rows_
from scripts.bench.packed_weights import microseconds

EXPERTS, WIDTH, HIDDEN, EACH, LAYERS = 128, 768, 2048, 8, 10
ROWS, USED = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8)
OFF = 0.02  # of the largest value: two orders of an FP32 sum, each of three roundings to BF16
PACKED: dict[str, tuple[Any, Any]] = {
    "w8a16": (EmulatedFP8Experts, NativeW8A16Experts),
    "w4a16": (EmulatedNVFP4Experts, NativeW4A16Experts),
}
Run = Callable[..., torch.Tensor]


def routed(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x bfloat16 [rows, H], weights float32 and ids int32 [rows, EACH]."""
    ids = torch.rand(rows, EXPERTS, device="cuda").topk(EACH).indices.int()
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    return x, torch.rand(rows, EACH, device="cuda"), ids


def layer(fmt: str) -> WeightOnlyExperts:
    packs, reads = PACKED[fmt]
    sizes = ((EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    made = [torch.randn(*size, dtype=torch.bfloat16, device="cuda").mul_(0.02) for size in sizes]
    read: WeightOnlyExperts = reads.of(packs(Masters(made[0], made[1], None, None), Form(), scales="absmax"))
    return read


def placed(
    kernel: Callable[..., None], of: WeightOnlyExperts, index: torch.Tensor, *rows: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(rows[0])
    kernel(out, index, *rows, of._matrix(0), of._matrix(1), Form())
    return out


KERNELS: dict[str, Run] = {"warps": partial(placed, warp_rows_), "rows": partial(placed, matrix_rows_)}


def check(fmt: str, name: str, run: Run, of: WeightOnlyExperts, want: torch.Tensor, *rows: torch.Tensor) -> None:
    index = torch.arange(len(want), device="cuda")
    found = run(of, index, *rows)
    off = float((found.float() - want.float()).abs().max() / want.float().abs().max())
    if not off <= OFF:
        raise SystemExit(f"{fmt}, {name}, {len(want)} rows: {off:.3g} of the largest value off")
    alone = run(of, index[-1:].contiguous(), *rows)[-1]
    if not torch.equal(alone, found[-1]):
        raise SystemExit(f"{fmt}, {name}, {len(want)} rows: not the bits of a row alone")


def measure(fmt: str, replays: int) -> dict[str, list[float]]:
    """By kernel, ``ROWS`` and, of those that place, ``USED``."""
    layers = [layer(fmt) for _ in range(LAYERS)]
    found: dict[str, list[float]] = {}
    for rows in ROWS:
        asked, index = routed(rows), torch.arange(rows, device="cuda")
        want = placed(matrix_rows_, layers[0], index, *asked)
        for name, run in KERNELS.items():
            check(fmt, name, run, layers[0], want, *asked)
            calls = [partial(run, of, index, *asked) for of in layers]
            found.setdefault(name, []).append(microseconds(calls, replays))
        sort = [partial(Emulated._on_gpu, of, *asked) for of in layers]
        found.setdefault("sorted", []).append(microseconds(sort, replays))
    asked = routed(FEW_ROWS)
    for used in USED:
        index = torch.full((FEW_ROWS,), -1, dtype=torch.int64, device="cuda")
        index[:used] = torch.randperm(FEW_ROWS, device="cuda")[:used]
        for name, run in KERNELS.items():
            found[name].append(microseconds([partial(run, of, index, *asked) for of in layers], replays))
    return found


def main(formats: Sequence[str], replays: int) -> None:
    said = "" if serves() else "; with this Triton `rows` serves, of FP8 up to 4 rows, and more are sorted"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}{said}")
    arms = {}
    for fmt in formats:
        arms[fmt] = measure(fmt, replays)
        heads = [*map(str, ROWS), *(f"{used} of {FEW_ROWS}" for used in USED)]
        print(f"{fmt:<8}" + "".join(f"{head:>9}" for head in heads))
        for name, times in arms[fmt].items():
            print(f"{name:<8}" + "".join(f"{time:>9.1f}" for time in times), flush=True)
    print(json.dumps({"device": torch.cuda.get_device_name(), "triton": triton.__version__, "experts": arms}))
