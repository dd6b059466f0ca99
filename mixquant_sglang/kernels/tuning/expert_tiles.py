"""Which tiles the grouped products of experts take: the candidates, and the table that chooses by shape and tokens.

It is timed once at start (``expert_cache.py``) and kept on disk, as the GEMMs of linears are.  A block of routes has
one expert, so what wins depends on how many tokens an expert gets: blocks of 128 pay from about 100 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mixquant_sglang.kernels.tuning.fp8_gemm import Cell


class Tile(NamedTuple):
    """Columns (of gate and of up each, in the first product), depth, warps and stages of a program."""

    n: int
    k: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Routes of a block, and the tile of the first and of the second product; ``halves``: a block that is not half
    full multiplies half of it."""

    rows: int
    up: Tile
    down: Tile
    halves: bool = False


# For FP8.  On an H200 the fastest of about 40 each for the experts of Qwen3-30B-A3B.
CANDIDATES: dict[str, Tiles] = {
    "128": Tiles(128, Tile(128, 128, 8, 4), Tile(128, 128, 4, 3)),
    "128 or 64": Tiles(128, Tile(128, 128, 8, 4), Tile(128, 128, 4, 3), halves=True),
    "64": Tiles(64, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3)),
    "64 wide": Tiles(64, Tile(128, 128, 4, 5), Tile(256, 64, 8, 5)),
    "32": Tiles(32, Tile(64, 128, 4, 4), Tile(128, 128, 4, 4)),
    "16": Tiles(16, Tile(32, 256, 4, 4), Tile(64, 256, 4, 4)),
}
# For BF16 operands, of the emulated kernels: within the shared memory of every GPU.
EMULATED = Tiles(64, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3))
FEW_EACH = Tiles(16, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3))  # of BF16 rows, up to 16 for an expert on average

Shape = tuple[int, int, int, int]  # experts (of this rank), I, H, experts a token
Where = tuple[int, int, int, int, int]  # the same, and tokens


def likely(shape: Shape, tokens: int) -> list[str]:
    """The candidates that are worth timing for ``tokens`` rows: their blocks are near what an expert gets."""
    experts, _, _, k = shape
    each = tokens * k / experts
    return [name for name, tiles in CANDIDATES.items() if each / 4 <= tiles.rows <= max(4 * each, 16)] or (
        ["128"] if each > 16 else ["16"]
    )


class TileTable:
    """What was timed, and the choice that follows from it."""

    def __init__(self, cells: Mapping[Where, Cell]) -> None:
        self.cells = dict(sorted(cells.items()))
        self._picks: dict[Shape, list[str]] = {}  # place e: up to 2**e tokens
        for (*shape, tokens), cell in self.cells.items():
            picks = self._picks.setdefault(tuple(shape), [])  # type: ignore[arg-type]
            picks += [cell.pick] * (tokens.bit_length() - len(picks))

    def pick(self, shape: Shape, tokens: int) -> Tiles:
        """For ``tokens`` >= 1: those of the next tuned bucket, of the largest beyond it; the blocks nearest to what an
        expert gets where nothing was tuned."""
        picks = self._picks.get(shape)
        if picks:
            return CANDIDATES[picks[min((tokens - 1).bit_length(), len(picks) - 1)]]
        each = tokens * shape[3] / shape[0]
        return CANDIDATES["16" if each <= 16 else "32" if each <= 32 else "64"]

    def describe(self, shape: Shape) -> str:
        cells = {where[-1]: cell for where, cell in self.cells.items() if where[:-1] == shape}
        out = {f"; {name} is out: {why}": None for cell in cells.values() for name, why in cell.out.items()}
        experts, i, h, k = shape
        what = f"fp8 experts [{experts} x {i}, {h}], {k} a token"
        return f"{what}: {', '.join(f'{m} rows: tiles of {cell}' for m, cell in cells.items())}{''.join(out)}"


_table = TileTable({})


def use(table: TileTable) -> None:
    """Lets experts of this process choose by ``table``."""
    global _table
    _table = table


def pick(shape: Shape, tokens: int) -> Tiles:
    return _table.pick(shape, tokens)
