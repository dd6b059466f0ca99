"""Random recipes, request policies, HTTP bodies, checkpoint headers and weight updates, each with one right answer.

    scripts/fuzz --url http://127.0.0.1:30000 --model PATH [--seconds 600] [--seed 1] [--stock URL]

``--url`` is a running server of a recipe that prefills in low precision, ``--model`` the checkpoint that it serves,
``--stock`` a server of the same checkpoint without mixquant: a body that SGLang itself answers with 5xx is not ours.
What must hold, at every step:

  recipes   load, and are the same again after ``to_yaml``, or end in one line
  policies  a valid one prefills in BF16 or is refused with a 400 that says so; any other is a 400; none at all is low
  bodies    no 5xx that stock does not give; no client text reaches another policy's cache
  headers   ``quantize`` and ready-made weights take a checkpoint whole or end in one line
  updates   a broken one is refused, and the answers after it are those of before, bit for bit

and between steps a fixed prompt is answered as at the start.  The first wrong answer ends the run with the seed of its
step: ``--seed S --steps 1`` repeats it.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.tools.fuzz_check import WrongError
from scripts.tools.fuzz_files import headers, recipes
from scripts.tools.fuzz_server import Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the server; without it only recipes and headers")
    parser.add_argument("--model", type=Path, help="the checkpoint that it serves")
    parser.add_argument("--stock", help="a server without mixquant")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--steps", type=int, help="at most so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="parts")
    args = parser.parse_args()
    if args.url and not args.model:
        parser.error("--url needs --model, the checkpoint that it serves")
    print(json.dumps(run(args.url, args.model, args.stock, args.seconds, args.seed, args.steps, args.only)))


def run(
    url: str | None,
    model: Path | None,
    stock: str | None,
    seconds: float,
    seed: int,
    steps: int | None = None,
    only: list[str] | None = None,
) -> dict[str, Any]:
    """Raises ``WrongError`` at the first wrong answer; returns how often what was seen."""
    parts: dict[str, Callable[[random.Random, Path], str]] = {"recipes": recipes, "headers": headers}
    target = None
    if url and model:
        target = Target(url, model, stock)
        served = {"policies": target.policies, "bodies": target.bodies, "namespaces": target.namespaces}
        parts |= {**served, "updates": target.updates}
    parts = {name: part for name, part in parts.items() if not only or name in only}
    seen: Counter[str] = Counter()
    spent = dict.fromkeys(parts, 0.0)
    end, step = time.monotonic() + seconds, 0
    while time.monotonic() < end and (steps is None or step < steps):
        rng = random.Random(seed + step)
        name = min(parts, key=lambda part: spent[part])  # each part gets its share of the time
        if steps == 1 and only:
            name = only[0]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                seen[f"{name}: {parts[name](rng, Path(folder))}"] += 1
                if target and name in ("policies", "bodies") and step % 20 == 0:
                    target.unharmed()
            except WrongError as wrong:
                raise WrongError(f"--only {name} --seed {seed + step} --steps 1: {wrong}") from None
        spent[name] += time.monotonic() - start
        step += 1
        if sys.stderr.isatty():
            with contextlib.suppress(OSError):
                sys.stderr.write(f"\r{step} steps, {end - time.monotonic():.0f} s left ")
    return {"seed": seed, "steps": step, "seen": dict(sorted(seen.items()))}


def command() -> None:
    main()
