"""What one arm of eval_text did with the windows of one cell, on disk, and the figures that come of it.

A part is a file: the best tokens of each step of the answers, the answer's own token last, and the greedy
continuations (of conversations: text_turns.py).  Its identity is all that the numbers depend on; parts of one table
differ in the arm alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from scripts.eval.statistics import Array, agreement, divergence

EDGES = (1, 8, 32, 128, 512)  # where bins of the place in the answer end
OWN = "server"  # what it says of itself: arms differ in it, and the recipe decides it
PLACE = ("sglang", "torch", "gpu", "flags", "wave", "kv_tokens", "source")  # what --collect takes as BF16's part has it
BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)  # of a file cut short
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
        """SystemExit, which names the file, where it cannot be read."""
        try:
            with file.open("rb") as data, np.load(data) as found:
                arrays = {one.name: found[one.name] for one in fields(cls)}
            return cls(**{**arrays, "identity": dict(json.loads(arrays["identity"].tobytes()))})
        except BROKEN as error:
            raise unreadable(file, error) from None


@dataclass(frozen=True)
class Part(Stored):
    ids: Array  # int32 [examples, answer tokens, top + 1 or fewer]
    logprobs: Array  # float32, the same shape
    greedy: Array  # int32 [examples, answer tokens]


def file_of(out: Path, cell: Cell, arm: str) -> Path:
    return out / "parts" / f"{cell[0]}-{cell[1]}-{arm}.npz"


def unreadable(file: Path, error: Exception) -> SystemExit:
    said = (str(error).strip().splitlines() or ["nothing said"])[0]
    return SystemExit(
        f"{file} cannot be read, as where it was cut short or is another program's ({type(error).__name__}: {said}): "
        "copy it again, or remove it and measure it again"
    )


def recipe_of(arm: str, recipes: Mapping[str, str]) -> str:
    """The text of an arm's recipe: of ``recipes``, or as the installed package ships it; SGLang's own have a name."""
    from mixquant_sglang.recipe import shipped

    if arm in recipes or arm.startswith("stock-"):
        return recipes.get(arm, arm)
    return shipped()[arm].read_text(encoding="utf-8")


def same_recipe(one: str, other: str) -> bool:
    """Whether two texts ask for the same; comments and descriptions aside."""
    if one == other:
        return True
    try:
        found = [yaml.safe_load(text) for text in (one, other)]
    except yaml.YAMLError:
        return False
    plain = [{k: v for k, v in each.items() if k != "description"} for each in found if isinstance(each, dict)]
    return len(plain) == 2 and plain[0] == plain[1]


def differs(identity: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first field in which a part is not what is asked for; empty where none is."""
    for name in {**expected, **identity}:
        if name not in (OWN, "recipe") and identity.get(name) != expected.get(name):
            return name
    return "" if same_recipe(str(identity.get("recipe")), str(expected.get("recipe"))) else "recipe"


class Check:
    """Whether parts are what a run asks for.  Until a recipe's text was kept, the part of a shipped one held its name
    alone: --collect takes such a part and says so, and nothing is measured beside it."""

    def __init__(self, collect: bool) -> None:
        self.collect = collect
        self.noted: set[str] = set()

    def __call__(
        self, file: Path, arm: str, identity: dict[str, Any], expected: dict[str, Any], base: dict[str, Any]
    ) -> None:
        """SystemExit where a part of ``identity`` differs; ``base``: the identity of BF16's part of the cell."""
        if self.collect:  # on whatever machine it was measured
            expected = expected | {name: base.get(name) for name in PLACE}
        unstated = identity.get("recipe") == arm != expected["recipe"]
        if unstated and self.collect:
            expected = expected | {"recipe": arm}
        if other := differs(identity, expected):
            if other != "recipe":
                said = f"was measured with another {other}"
            elif unstated:
                said = f"does not say what recipe {arm} was when it was measured; --collect takes it, to go on"
            else:
                said = f"was measured with another recipe than {arm} is now"
            raise SystemExit(f"{file} {said}: name another --out, or remove it")
        if unstated and arm not in self.noted:
            self.noted.add(arm)
            print(f"{file}: an older version measured it, and kept of its recipe the name alone", file=sys.stderr)


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
