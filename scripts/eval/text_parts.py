"""What one arm of eval_text did with the windows of one cell, on disk, and the figures that come of it.

A part is a file: the best tokens of each step of the answers, the answer's own token last, and the greedy
continuations (of conversations: text_turns.py).  Its identity is all that the numbers depend on; parts of one table
differ in the arm alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from scripts.eval.statistics import Array, agreement, divergence

EDGES = (1, 8, 32, 128, 512)  # where bins of the place in the answer end
OWN = "server"  # what it says of itself: arms differ in it, and the recipe decides it
BESIDE = (
    *(("nvfp4-unprotected", "nvfp4"), ("nvfp4-absmax", "nvfp4"), ("fp8-attention", "fp8")),
    *(("fp8-compact", "fp8"), ("nvfp4-compact", "nvfp4")),
)
REFERENCE, WORST = "bf16", "nvfp4-everywhere"
Cell = tuple[str, int | str]  # a source at a length, or (conversations) in a mode
S = TypeVar("S", bound="Stored")


@dataclass(frozen=True)
class Stored:
    """Arrays in a file, with all that they depend on."""

    identity: dict[str, Any]

    def save(self, file: Path) -> None:
        made = file.with_suffix(".part")
        arrays = {one.name: getattr(self, one.name) for one in fields(self)}
        arrays["identity"] = np.frombuffer(json.dumps(self.identity).encode(), dtype=np.uint8)
        with made.open("wb") as out:
            np.savez_compressed(out, **arrays)
        made.replace(file)

    @classmethod
    def load(cls: type[S], file: Path) -> S:
        with np.load(file) as found:
            arrays = {one.name: found[one.name] for one in fields(cls)}
        return cls(**{**arrays, "identity": json.loads(arrays["identity"].tobytes())})


@dataclass(frozen=True)
class Part(Stored):
    ids: Array  # int32 [examples, answer tokens, top + 1 or fewer]
    logprobs: Array  # float32, the same shape
    greedy: Array  # int32 [examples, answer tokens]


def file_of(out: Path, cell: Cell, arm: str) -> Path:
    return out / "parts" / f"{cell[0]}-{cell[1]}-{arm}.npz"


def differs(identity: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first field in which a part is not what is asked for; empty where none is."""
    names = [name for name in {**expected, **identity} if name != OWN]
    return next((name for name in names if identity.get(name) != expected.get(name)), "")


def measured_with(identities: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """GPU, versions and emulated kernels of the parts of one table: all that there is of each, since cells may come
    from several machines and arms from several versions."""
    every = [*identities]
    servers = [identity["server"] for identity in every]
    found = {name: {identity[name] for identity in every} for name in ("gpu", "sglang", "torch")}
    found["mixquant"] = {server["version"] for server in servers} - {""}  # none where SGLang is without
    found["emulated"] = {p for server in servers for p, kernel in server["kernel"].items() if kernel == "emulated"}
    return {name: sorted(one) for name, one in found.items()}


def source_digest() -> str:
    """Of the installed package's modules: its version alone does not tell two commits apart."""
    import mixquant_sglang

    digest = hashlib.sha256()
    folder = Path(mixquant_sglang.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def bins(tokens: int) -> list[tuple[int, int]]:
    """Places in the answer, from 0: start, stop."""
    ends = [edge for edge in EDGES if edge < tokens]
    return [*pairwise([0, *ends, tokens])]


def bin_name(start: int, stop: int) -> str:
    return f"kl {stop}" if stop == start + 1 else f"kl {start + 1}-{stop}"


def figures(part: Part, base: Part) -> dict[str, list[float]]:
    """``{measure: [by example]}`` against BF16's part ``base``."""
    n, tokens, width = base.ids.shape
    flat = [x.reshape(n * tokens, width) for x in (base.ids, base.logprobs, part.ids, part.logprobs)]
    kl = divergence(*flat).reshape(n, tokens)
    found = {
        "kl": kl.mean(1),
        **{bin_name(start, stop): kl[:, start:stop].mean(1) for start, stop in bins(tokens)},
        "nll": -part.logprobs[:, :, -1].astype(np.float64).mean(1),
        "same": np.array([agreement(*both) for both in zip(part.greedy.tolist(), base.greedy.tolist(), strict=True)]),
        "identical": (part.greedy == base.greedy).all(1),
    }
    return {name: [round(float(value), 9) for value in values] for name, values in found.items()}
