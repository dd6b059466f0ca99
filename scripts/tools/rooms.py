"""Draws docs/rooms.svg, the picture of docs/design.md: the package's rooms and what they import, read off the code."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, NAME = ROOT / "mixquant_sglang", "mixquant_sglang"
OUT = ROOT / "docs" / "rooms.svg"
# Low to high: a room imports those before it, also where the import is lazy or for types alone.
ROOMS = ("errors", "recipe", "formats", "kernels", "passes", "weights", "versions", "layers", "host", "tools")
WIDTH, STEP, BOX, HEIGHT, BASE = 940, 100, 86, 46, 210
DARK, LINE, FILL, SGLANG = "#0f172a", "#64748b", "#e2e8f0", "#fde68a"


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name below the package -> file."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return found


def imported(file: Path) -> Iterator[str]:
    """Dotted names that ``file`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    edges: dict[str, set[str]] = {}
    for name, file in known.items():
        edges[name] = set()
        for target in imported(file):
            inner = target.removeprefix(f"{NAME}.") if target.startswith(f"{NAME}.") else ""
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            edges[name] |= {inner} - {"", name}
    return edges


def between(edges: dict[str, set[str]]) -> dict[tuple[str, str], int]:
    """(room, room that it imports) -> how many imports of modules."""
    found: dict[tuple[str, str], int] = {}
    for name, targets in edges.items():
        for target in targets:
            pair = name.partition(".")[0], target.partition(".")[0]
            if pair[0] != pair[1] and {*pair} <= {*ROOMS} - {"errors"}:
                found[pair] = found.get(pair, 0) + 1
    return found


def text(x: float, y: float, said: str, *, size: int = 13, color: str = DARK) -> str:
    font = f'font-family="sans-serif" font-size="{size}"'
    return f'<text x="{x:g}" y="{y:g}" {font} fill="{color}" text-anchor="middle">{said}</text>'


def draw() -> str:
    known = modules()
    edges = graph(known)
    rooms = [room for room in ROOMS if room != "errors"]
    at = {room: 20 + i * STEP for i, room in enumerate(rooms)}
    parts = []
    for (room, lower), n in sorted(between(edges).items()):
        start, stop = at[room] + BOX / 2 - 8, at[lower] + BOX / 2 + 8
        rise = 18 + 0.17 * (start - stop)
        width = 1 + min(n, 24) / 8
        parts.append(
            f'<path d="M{start:g} {BASE} C{start:g} {BASE - rise:g} {stop:g} {BASE - rise:g} {stop:g} {BASE}" '
            f'fill="none" stroke="{LINE}" stroke-width="{width:g}" opacity="0.6"/>'
        )
    for room in rooms:
        files = [name for name in known if name.partition(".")[0] == room]
        knows = any(target.partition(".")[0] == "sglang" for name in files for target in imported(known[name]))
        fill = SGLANG if knows else FILL
        parts.append(f'<rect x="{at[room]}" y="{BASE}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{fill}"/>')
        parts.append(text(at[room] + BOX / 2, BASE + 20, room))
        parts.append(text(at[room] + BOX / 2, BASE + 37, f"{len(files)} files", size=11, color=LINE))
    said = "Arcs lead left, to what a room imports; the thicker, the more imports. Yellow rooms import SGLang."
    parts.append(text(WIDTH / 2, BASE + HEIGHT + 24, said, color=LINE))
    whole = BASE + HEIGHT + 36
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole}" width="{WIDTH}" height="{whole}">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{whole}" fill="#ffffff"/>', *parts, "</svg>", ""])


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.parse_args().out.write_text(draw())
