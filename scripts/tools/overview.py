"""Draws docs/overview.svg, the picture of the README: which token rows take which precision, over one KV cache.

scripts/draw_overview [OUT]
"""

from __future__ import annotations

import argparse
from pathlib import Path

OUT = Path(__file__).resolve().parents[2] / "docs" / "overview.svg"
LOW, HIGH, CACHE = "#d97706", "#2563eb", "#64748b"
WIDTH, STEP, BOX = 860, 44, 38
TURNS = (("turn 1", 6, 4), ("turn 2", 4, 4))  # name, prompt tokens, generated tokens


def text(x: float, y: float, said: str, *, size: int = 14, color: str = "#334155", anchor: str = "middle") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-family="sans-serif" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}">{said}</text>'
    )


def box(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{color}"/>'


def draw() -> str:
    parts, x = [], 26.0
    for name, prompt, generated in TURNS:
        start = x
        for i in range(prompt + generated):
            low = i < prompt - 1
            parts.append(box(x, 66, BOX, BOX, LOW if low else HIGH))
            parts.append(f'<path d="M{x + BOX / 2:g} 106 v24" stroke="{LOW if low else HIGH}" stroke-width="2"/>')
            x += STEP
        cut, end = start + prompt * STEP, x - (STEP - BOX)
        parts.append(text((start + cut) / 2 - 3, 56, f"{name}: prompt, tool result"))
        parts.append(text((cut + end) / 2, 56, "answer"))
        x += 12
    parts.append(box(26, 132, x - 26 - 18, 30, CACHE))
    parts.append(
        text((26 + x) / 2, 152, "one KV cache in BF16: later turns read it, nothing is prefilled twice", color="#fff")
    )
    legend = (
        (26.0, LOW, "FP8 (Hopper, Ada) or NVFP4 (Blackwell) linears"),
        (430.0, HIGH, "BF16 linears: last prompt token and every answer"),
    )
    for at, color, said in legend:
        parts += [box(at, 184, 18, 18, color), text(at + 26, 198, said, anchor="start")]
    parts.append(text(26, 28, "One server, one BF16 checkpoint", size=17, color="#0f172a", anchor="start"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 216" width="{WIDTH}" height="216">'
    return "\n".join([head, box(0, 0, WIDTH, 216, "#ffffff"), *parts, "</svg>", ""])


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.parse_args().out.write_text(draw())
