"""What eval_text and eval_tasks share: their arms, the servers that these run on, and how a command ends."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from scripts.bench.servers import Arm, serving
from scripts.eval.arms import FLAGS
from scripts.eval.run import processor_on_path
from scripts.eval.text_parts import REFERENCE, WORST
from scripts.public.server import Stop

VARIANTS = {  # recipes that are not shipped
    "nvfp4-unprotected": "version: 1\nprefill: {precision: nvfp4}\nprotect: {last_prompt_token: false}\n",
    "nvfp4-absmax": "version: 1\nprefill: {precision: nvfp4}\nweights: {scales: absmax}\n",
}
ARMS = (
    *(REFERENCE, WORST, "stock-fp8", "w4a16", "w8a16", "nvfp4", *VARIANTS, "nvfp4-fp8", "nvfp4-fp8-down", "fp8"),
    *("fp8-attention", "fp8-compact", "nvfp4-compact"),
)


def arms_of(parser: argparse.ArgumentParser, asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names of the arms, BF16 first, and the recipes of those that are not shipped.  A file is an arm by its name
    without suffix."""
    names, recipes = [REFERENCE], dict(VARIANTS)
    for arm in asked:
        if arm in ARMS:
            names.append(arm)
            continue
        file = Path(arm)
        if not file.is_file():
            parser.error(f"argument --arms: {arm} is no recipe file and none of {', '.join(ARMS)}")
        text = file.read_text(encoding="utf-8")
        if file.stem in ARMS or recipes.get(file.stem, text) != text:
            parser.error(f"argument --arms: there is another arm {file.stem}; rename {arm}")
        names.append(file.stem)
        recipes[file.stem] = text
    return list(dict.fromkeys(names)), recipes


def digest_of(model: Path) -> str:
    """Of config, tokenizer and weights; of these the sizes and the first and last MiB."""
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.suffix == ".safetensors":
            with file.open("rb") as data:
                digest.update(f"{file.name} {file.stat().st_size}".encode() + data.read(1 << 20))
                data.seek(max(0, file.stat().st_size - (1 << 20)))
                digest.update(data.read())
        elif file.name in ("config.json", "tokenizer.json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def stock_state(arm: Arm) -> dict[str, Any]:
    precision = Path(arm.name).name.removeprefix("stock-")
    return {"version": "", "precision": {"prefill": precision, "decode": precision}, "kernel": {precision: "SGLang's"}}


class Measuring(Protocol):
    """A run of arms over cells: eval_text's, eval_tasks'."""

    args: argparse.Namespace

    def waiting(self) -> list[str]: ...

    def measure(self, arm: Arm, name: str) -> None: ...


def measured(run: Measuring) -> list[str]:
    """The arms to report: all, measured now where they were not; with --collect those that are there."""
    args, waiting = run.args, run.waiting()
    if not args.collect:
        measure(run, waiting)
        return list(args.arms)
    if REFERENCE in waiting:
        raise SystemExit(f"{args.out}: {REFERENCE} is not measured in every cell, and all arms are compared with it")
    if waiting:
        print(f"not measured in every cell, so left out: {', '.join(waiting)}", file=sys.stderr)
    return [arm for arm in args.arms if arm not in waiting]


def measure(run: Measuring, waiting: list[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    args = run.args
    os.environ["MIXQUANT_MIN_TOKENS"] = "1"
    args.dummy, args.model_path, args.logs = False, args.model.resolve(), args.out / "logs"
    args.logs.mkdir(parents=True, exist_ok=True)
    files = {name: args.logs / f"{name}.yaml" for name in args.recipes}
    for name, file in files.items():
        file.write_text(args.recipes[name])
    flags = [*FLAGS, "--random-seed", str(args.seed), *args.flags]
    for at in range(0, len(waiting), args.parallel):
        names = waiting[at : at + args.parallel]
        served = [str(files.get(name, name)) for name in names]
        group = argparse.Namespace(**{**vars(args), "arms": served, "flags": flags})
        # The pool outside: whatever ends this, servers are stopped first, and requests to them fail.
        with ThreadPoolExecutor(len(names)) as pool, processor_on_path(), serving(group, timed=False) as arms:
            for job in [pool.submit(run.measure, arm, name) for arm, name in zip(arms, names, strict=True)]:
                job.result()


def started(main: Callable[[], None]) -> None:
    """``main`` as a command: what is wrong with its data ends it in one line."""
    try:
        main()
    except Stop as stop:
        sys.exit(f"{Path(sys.argv[0]).stem}: {stop}")
    except KeyboardInterrupt:
        sys.exit(130)
