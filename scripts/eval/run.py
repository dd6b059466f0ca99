"""A run of eval_accuracy: cells, the files they lie in, the servers they are measured on, and the report."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np

from scripts.bench.servers import Arm, machine
from scripts.eval.ablation import plot_tradeoff, speeds, tradeoff
from scripts.eval.arms import Client, recipe
from scripts.eval.cells import MEASURES, Problem, Raw, Settings, figures, measure, problems, text_problems
from scripts.eval.report import plot, tables
from scripts.eval.statistics import REFERENCE, WORST, analyse
from scripts.eval.text_parts import BROKEN, source_digest, unreadable
from scripts.models.tiny_tasks import default_lines, examples
from scripts.models.tiny_text import END_OF_TEXT, Tokenizer, stdlib_files

HERE = Path(__file__).resolve().parent
FIXED = ("n", "samples", "temperature", "top_p", "top", "answer_tokens", "seed", "kv_tokens", "wave", "flags")
TEXT, TEXT_TOKENS = "text", 128  # the task of continuing real text, and how many tokens of it count


@dataclass(frozen=True)
class Cell:
    task: str
    level: int
    length: int

    def file(self, out: Path, arm: str) -> Path:
        return out / "cells" / f"{self.task}-{self.level}-{self.length}-{arm.replace('/', '-')}.json"


def identity(args: argparse.Namespace, lines: list[str]) -> dict[str, Any]:
    """All that the figures of a cell depend on, the cell itself aside."""
    digest = hashlib.sha256()
    for file in sorted(args.model.iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", "tokenizer.json"):
            digest.update(file.read_bytes())
    text = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    where = {key: value for key, value in machine().items() if key != "commit"}
    fixed = {name: getattr(args, name) for name in FIXED}
    return {**where, "source": source_digest(), "model": digest.hexdigest()[:16], "text": text[:16], **fixed}


def read(file: Path) -> dict[str, Any]:
    """A cell of an arm; SystemExit, which names the file, where it cannot be read."""
    try:
        found = dict(json.loads(file.read_text()))
        found["identity"] = dict(found["identity"])
        return found
    except BROKEN as error:
        raise unreadable(file, error) from None


def corpus(data: Path | None, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the held-out files, each with its end."""
    if data:
        return list(np.load(data / "eval.npz")["tokens"].tolist())
    return [token for text in stdlib_files("eval").values() for token in (*tokenizer.encode(text), END_OF_TEXT)]


def state_of(arm: Arm) -> dict[str, Any]:
    """What the server says of its precisions and kernels, and of which FP8 GEMMs served, where it timed them."""
    with urllib.request.urlopen(f"{arm.url}/server_info", timeout=60) as response:
        state = json.loads(response.read())["internal_states"][0]["mixquant"]
    gemms = {"fp8_gemms": state["fp8_gemms"]} if "fp8_gemms" in state else {}
    return {key: state[key] for key in ("version", "precision", "kernel")} | gemms


@contextlib.contextmanager
def processor_on_path() -> Iterator[None]:
    """Servers that start inside find scripts.eval.processor, and nothing else of this checkout."""
    before = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory(prefix="eval_processor_") as folder:
        package = Path(folder, "scripts", "eval")
        package.mkdir(parents=True)
        for made in (package.parent, package):
            (made / "__init__.py").touch()
        copy(HERE / "processor.py", package)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before


class Run:
    """Cells, the files they lie in, and what BF16 did in each, which the other arms are compared with."""

    def __init__(self, args: argparse.Namespace, cells: list[Cell]) -> None:
        self.args, self.cells = args, cells
        self.modes = ("kept", "flushed") if args.multi_turn else ("",)
        self.reference: dict[Cell, list[Raw]] = {}
        if args.report:
            self.identity = self._identity_of_files()
            vars(args).update({name: self.identity[name] for name in FIXED})
            return
        if args.data:
            self.lines = gzip.decompress((args.data / "eval.txt.gz").read_bytes()).decode().splitlines()
        else:
            self.lines = default_lines("eval")
        self.corpus: list[int] = []
        if any(cell.task == TEXT for cell in cells):
            self.corpus = corpus(args.data, args.tokenizer)
        self.identity = identity(args, self.lines)
        self.settings = Settings(
            args.samples, args.temperature, args.top_p, args.answer_tokens, args.seed, args.kv_tokens, args.wave
        )
        (args.out / "cells").mkdir(parents=True, exist_ok=True)

    def _identity_of_files(self) -> dict[str, Any]:
        """What the first cell was measured with; ``stored`` refuses the others if they differ."""
        for cell in self.cells:
            file = cell.file(self.args.out, self.names(REFERENCE)[0])
            if file.is_file():
                return {k: v for k, v in read(file)["identity"].items() if k != "recipe"}
        raise SystemExit(f"{self.args.out}: holds no cell of this command: name the folder of a finished run")

    def recipe(self, arm: str) -> str:
        return recipe(arm, self.args.layers)

    def names(self, arm: str) -> list[str]:
        return [f"{arm}/{mode}" if mode else arm for mode in self.modes]

    def stored(self, cell: Cell, arm: str) -> dict[str, Any] | None:
        file = cell.file(self.args.out, arm)
        if not file.is_file():
            return None
        found = read(file)
        expected = {**self.identity, "recipe": self.recipe(arm.partition("/")[0])}
        other = [name for name, value in expected.items() if found["identity"].get(name) != value]
        if other:
            raise SystemExit(f"{file} was measured with another {other[0]}: name another --out, or remove it")
        return found

    def waiting(self) -> list[Cell]:
        """Cells that some arm lacks; these are measured for every arm, because all are compared with BF16's tokens."""
        every = [name for arm in self.args.arms for name in self.names(arm)]
        return [cell for cell in self.cells if any(self.stored(cell, name) is None for name in every)]

    def problems_of(self, cell: Cell) -> list[Problem]:
        args = self.args
        if cell.task == TEXT:
            made = text_problems(self.corpus, args.n, cell.length, TEXT_TOKENS)
        else:
            made = problems(
                examples(cell.task, "eval", args.n, args.seed, level=cell.level, length=cell.length, lines=self.lines),
                args.tokenizer,
            )
        longest = max(problem.room for problem in made)
        if longest > min(args.context, args.kv_tokens):
            raise SystemExit(
                f"{cell.task} at {cell.length}: a conversation may take {longest} tokens; the model has "
                f"{args.context}, --kv-tokens {args.kv_tokens}: give shorter --lengths or more --kv-tokens"
            )
        return made

    def measure(self, pool: ThreadPoolExecutor, arms: list[Arm], cells: list[Cell]) -> None:
        """The cells on servers that are up, side by side, each in a thread of ``pool``.  Cells of one task, which
        differ in length, share waves, because a wave takes as long as its longest answer."""
        states = {Path(arm.name).stem: state_of(arm) for arm in arms}
        for task, group in itertools.groupby(cells, key=lambda cell: cell.task):
            together = {cell: self.problems_of(cell) for cell in group}
            jobs = {Path(arm.name).stem: pool.submit(self._measure_arm, arm, task, together) for arm in arms}
            done = {arm: job.result() for arm, job in jobs.items()}
            if REFERENCE in done:
                self.reference |= {cell: done[REFERENCE][cell, self.modes[0]] for cell in together}
            for arm, found in done.items():
                for (cell, mode), raw in found.items():
                    self._store(cell, f"{arm}/{mode}" if mode else arm, arm, states[arm], raw)

    def _measure_arm(
        self, arm: Arm, task: str, together: dict[Cell, list[Problem]]
    ) -> dict[tuple[Cell, str], list[Raw]]:
        began = time.monotonic()
        client, found = Client(arm, self.args.top), {}
        every = [problem for part in together.values() for problem in part]
        for mode in self.modes:
            raw = measure(client, every, self.settings, self.args.tokenizer, flushed=mode == "flushed")
            for cell, part in together.items():
                found[cell, mode], raw = raw[: len(part)], raw[len(part) :]
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in client.spent.items())
        name = Path(arm.name).stem
        print(f"{name}: {task}, {len(every)} examples, {time.monotonic() - began:.1f} s: {spent}", file=sys.stderr)
        sys.stderr.flush()
        return found

    def _store(self, cell: Cell, name: str, arm: str, state: dict[str, Any], raw: list[Raw]) -> None:
        found = {
            "identity": {**self.identity, "recipe": self.recipe(arm)},
            "cell": asdict(cell),
            "arm": name,
            "server": state,
            **figures(raw, self.reference[cell], self.settings if cell.task == TEXT else None),
        }
        part = cell.file(self.args.out, name).with_suffix(".part")
        part.write_text(json.dumps(found) + "\n")
        part.replace(cell.file(self.args.out, name))

    def report(self) -> dict[str, Any]:
        """Writes the files; the line for stdout."""
        args = self.args
        names = [name for arm in args.arms for name in self.names(arm)]
        found = {cell: {name: self.stored(cell, name) for name in names} for cell in self.cells}
        files = {cell: {n: one for n, one in row.items() if one} for cell, row in found.items()}
        values = {
            (c.task, c.length): {n: {m: one[m] for m in MEASURES} for n, one in row.items()} for c, row in files.items()
        }
        base = self.names(REFERENCE)[0]
        pairs = [(name, base) for name in names if name != base]
        if args.multi_turn:
            pairs += [(f"{arm}/flushed", f"{arm}/kept") for arm in args.arms if arm != REFERENCE]
        results = analyse(values, pairs, (base, self.names(WORST)[0]), args.seed, args.draws)
        row = files[self.cells[0]]
        servers = {name: row[name]["server"] for name in names}
        emulated = sorted({p for s in servers.values() for p, kernel in s["kernel"].items() if kernel == "emulated"})
        gpus = " and ".join(sorted({*self.identity["gpu"].splitlines()}))
        head = (
            f"{args.n} examples of each task and length, {args.samples} samples at T {args.temperature:g}, top-p "
            f"{args.top_p:g}; GPU {gpus}, SGLang {self.identity['sglang']}, torch "
            f"{self.identity['torch']}; emulated: {', '.join(emulated) or 'nothing'}"
        )
        text = f"{head}\n\n{tables(results)}\n"
        fast: dict[str, float] = {}
        if args.ablation:
            fast = speeds(args.arms)
            text = f"{head}\n\n{tradeoff(results, fast)}\n\n{tables(results)}\n"
            plot_tradeoff(results, fast, args.out / "tradeoff.png", head)
        turns = {f"{c.task} {c.length}": {n: one["by_turn"] for n, one in r.items()} for c, r in files.items()}
        where = machine()
        if args.report:  # the commit is that of this command, and not known of the run
            where |= {"commit": "unknown", **{name: self.identity[name] for name in ("gpu", "sglang", "torch")}}
        facts = {
            **where,
            "identity": self.identity,
            "servers": servers,
            "recipes": {a: self.recipe(a) for a in args.arms},
        }
        full = {**facts, "cells": [asdict(cell) for cell in self.cells], "results": results, "by_turn": turns}
        (args.out / "results.json").write_text(json.dumps(full, indent=1) + "\n")
        (args.out / "tables.txt").write_text(text)
        drawn = plot(results, args.out / "accuracy.png", head)
        print(text if drawn else f"{text}\n(no plot: matplotlib is not installed)\n")
        short = {measure: results["all"][measure] for measure in MEASURES}
        predicted = {"predicted_prefill_speedup": fast} if fast else {}
        return {**where, "out": str(args.out), "n": args.n, "emulated": emulated, **predicted, "all": short}
