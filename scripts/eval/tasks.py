#!/usr/bin/env python3
"""Accuracy of recipes on public tasks, with any chat checkpoint: real servers, the same prompts, paired intervals.

Arms are those of eval_text, or files of recipes.  Tasks (tasks_data.py): all of GSM8K, alone and behind worked problems
(--shots), so that prefill has something to do; MATH-500; RULER's look-ups in essays, at --lengths.

    greedy      the answer at temperature 0
    sampled     the share of --samples answers at --temperature that are right, of tasks without a long prompt; a draw
                goes by (seed, step, token), so that arms draw with the same noise (processor.py)
    recovered   (arm - nvfp4-everywhere) / (bf16 - nvfp4-everywhere); none where the interval of that loss holds 0

Prompts go to the server in waves of token ids, each from an empty cache: it then forms the same batches each time, and
equal batches give equal bits.  The same command on the same machine gives the same table.  Intervals: paired bootstrap
over problems (statistics.py).  Passes are low however short they are (MIXQUANT_MIN_TOKENS=1): what a recipe does, and
not what it leaves alone.  NVFP4 is emulated where the GPU has no tensor cores for it; the table says so.

OUT/parts has the texts of each arm and cell: the same command goes on where it was cut short, arms may be measured one
by one (--arms), and --collect makes the table of what is there, on any machine.  Writes OUT/results.json and
OUT/tables.txt; the last line of stdout is JSON.

    scripts/eval_tasks --model MODEL --data DATA --out OUT --parallel 4
    scripts/eval_tasks --model MODEL --data DATA --out OUT --tasks gsm8k --shots 0 --samples 0 --arms fp8
    scripts/eval_tasks --model MODEL --data DATA --out OUT --collect
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from scripts.bench.servers import Arm, machine
from scripts.eval.arms import Answer, Client
from scripts.eval.measuring import ARMS, arms_of, digest_of, measured, started, stock_state
from scripts.eval.run import state_of
from scripts.eval.statistics import analyse
from scripts.eval.tasks_data import FILES, LOOKUPS, Cell, Problem, cells_of, family, missing, problems
from scripts.eval.tasks_report import tables
from scripts.eval.text_parts import (
    BESIDE,
    BROKEN,
    REFERENCE,
    WORST,
    Check,
    measured_with,
    recipe_of,
    source_digest,
    unreadable,
)
from scripts.public.grading import math_grader

TOKENS = {"gsm8k": 512, "math500": 1024}
FIXED = ("samples", "temperature", "top_p", "top_k", "wave", "kv_tokens", "seed", "flags")
Part = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a BF16 chat checkpoint with its tokenizer")
    add("--data", type=Path, required=True, help="folder with the files of the tasks (tasks_data.py)")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--arms", nargs="+", metavar="ARM", help="of eval_text, or recipe files; default: all; bf16 is always there")
    add("--tasks", nargs="+", choices=(*FILES, *LOOKUPS), default=[*FILES, *LOOKUPS], help="default: %(default)s")
    add(
        "--shots", nargs="+", type=int, default=[0, 8, 32], help="worked problems before GSM8K's (default: %(default)s)"
    )
    add("--lengths", nargs="+", type=int, default=[2048, 8192], help="of look-ups, in tokens (default: %(default)s)")
    add("--n", type=int, default=130, help="look-ups of each task and length (default: %(default)s)")
    add("--limit", type=int, help="first problems of GSM8K and MATH-500 only")
    add("--samples", type=int, default=4, help="draws of each problem (default: %(default)s)")
    add("--temperature", type=float, default=0.6, help="of draws (default: %(default)s)")
    add("--top-p", type=float, default=0.95, help="default: %(default)s")
    add("--top-k", type=int, default=20, help="default: %(default)s")
    for task, most in TOKENS.items():
        add(f"--{task}-tokens", type=int, default=most, help=f"of an answer to {task} at most (default: {most})")
    add("--wave", type=int, default=512, help="prompts under way at once, at most (default: %(default)s)")
    add("--kv-tokens", type=int, default=1_000_000, help="KV pool of each server (default: %(default)s)")
    add("--parallel", type=int, default=1, help="servers that are up at once (default: %(default)s)")
    add("--gpus", type=int, default=1, help="that the servers are spread over (default: %(default)s)")
    add("--collect", action="store_true", help="the table of the parts in OUT, and no measurement")
    add("--seed", type=int, default=0, help="of servers, draws, look-ups and bootstrap (default: %(default)s)")
    add("--draws", type=int, default=10000, help="of the bootstrap (default: %(default)s)")
    add("--start-limit", type=float, default=400, help="seconds a server may take (default: %(default)s)")
    add("flags", nargs="*", help="after --: more flags for every server")
    args = parser.parse_args(argv)
    args.tokens = {task: getattr(args, f"{task}_tokens") for task in TOKENS}
    low = {"n": 1, "wave": 1, "parallel": 1, "gpus": 1, "draws": 100, "samples": 0, "top_k": 1}
    for name, least in {**low, **{f"{task}_tokens": 1 for task in TOKENS}}.items():
        if getattr(args, name) < least:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is less than {least}")
    if args.samples and args.temperature <= 0:
        parser.error("argument --temperature: draws need one above 0; greedy answers are there in any case")
    if min(args.shots) < 0 or (args.limit is not None and args.limit < 1):
        parser.error("arguments --shots, --limit: too small")
    if not (args.model / "config.json").is_file():
        parser.error(f"argument --model: {args.model} has no config.json; name the folder of a checkpoint")
    if lacking := missing(args.tasks, args.data):
        parser.error(f"argument --data: {args.data} has no {lacking}")
    args.arms, args.recipes = arms_of(parser, args.arms or ARMS)
    args.out = args.out.resolve()
    return args


def waves(every: list[Problem], samples: int, wave: int, kv_tokens: int) -> list[list[Problem]]:
    """Neighbours that are asked together: what the KV pool holds, ``wave`` prompts at most."""
    made: list[list[Problem]] = [[]]
    used = 0
    for problem in every:
        need = samples * (len(problem.prompt) + problem.limit)
        if made[-1] and (used + need > kv_tokens or (len(made[-1]) + 1) * samples > wave):
            made.append([])
            used = 0
        made[-1].append(problem)
        used += need
    return made


def read(file: Path) -> Part:
    """SystemExit, which names the file, where it cannot be read."""
    try:
        part: Part = json.loads(gzip.decompress(file.read_bytes()))
        part["identity"], part["greedy"] = dict(part["identity"]), list(part["greedy"])
        return part
    except BROKEN as error:
        raise unreadable(file, error) from None


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        self.args, self.cells, self.check = args, cells_of(args), Check(args.collect)
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        if not getattr(self.tokenizer, "chat_template", None):
            raise SystemExit(
                f"--model: {args.model} has no chat template, which these tasks need; eval_text needs none"
            )
        context = AutoConfig.from_pretrained(args.model).get_text_config().max_position_embeddings
        self.problems = {cell: problems(cell, args, self.tokenizer) for cell in self.cells}
        longest = max(len(one.prompt) + one.limit for every in self.problems.values() for one in every)
        if longest > min(context, args.kv_tokens):
            raise SystemExit(
                f"a prompt and its answer take {longest} tokens; the model has {context} positions, "
                f"--kv-tokens {args.kv_tokens}"
            )
        self.stops = self._stops()
        where = machine()
        self.identity = {
            **{name: where[name] for name in ("sglang", "torch")},
            "gpu": " and ".join(sorted({*where["gpu"].splitlines()})),
            "model": digest_of(args.model),
            "source": source_digest(),
            "stops": [*self.stops],
            **{name: getattr(args, name) for name in FIXED},
        }
        (args.out / "parts").mkdir(parents=True, exist_ok=True)

    def _stops(self) -> tuple[int, ...]:
        """What ends an answer: the tokenizer's and the generation config's end, and the end of a turn."""
        found = {self.tokenizer.eos_token_id}
        file = self.args.model / "generation_config.json"
        if file.is_file():
            ends = json.loads(file.read_text()).get("eos_token_id")
            found |= {*ends} if isinstance(ends, list) else {ends}
        vocabulary = self.tokenizer.get_vocab()
        found |= {vocabulary[name] for name in ("<|im_end|>", "<|endoftext|>", "<end_of_turn>") if name in vocabulary}
        return tuple(sorted(token for token in found if token is not None))

    def file(self, cell: Cell, arm: str) -> Path:
        return Path(self.args.out, "parts", f"{cell[0]}-{cell[1]}-{arm}.json.gz")

    def identity_of(self, cell: Cell, arm: str) -> dict[str, Any]:
        every = [[one.id, one.prompt, one.limit] for one in self.problems[cell]]
        asked = hashlib.sha256(json.dumps(every).encode()).hexdigest()[:16]
        own = {"cell": [*cell], "asked": asked, "samples": self.samples(cell)}
        return self.identity | own | {"recipe": recipe_of(arm, self.args.recipes)}

    def samples(self, cell: Cell) -> int:
        """Draws are of short prompts: behind a long one a second look at the same KV costs most and says least."""
        return int(self.args.samples) if cell in (("gsm8k", 0), ("math500", 0)) else 0

    def stored(self, cell: Cell, arm: str) -> Part | None:
        file = self.file(cell, arm)
        if not file.is_file():
            return None
        part, expected, base = read(file), self.identity_of(cell, arm), self.file(cell, REFERENCE)
        known = read(base)["identity"] if self.args.collect and base.is_file() else expected
        self.check(file, arm, part["identity"], expected, known)
        return part

    def waiting(self) -> list[str]:
        return [arm for arm in self.args.arms if any(self.stored(cell, arm) is None for cell in self.cells)]

    def measure(self, arm: Arm, name: str) -> None:
        """All cells that ``name`` lacks, on its server."""
        client = Client(arm, 0, stops=self.stops)
        server = state_of(arm) if not name.startswith("stock-") else stock_state(arm)
        for cell in self.cells:
            if self.stored(cell, name) is not None:
                continue
            began, every = time.monotonic(), self.problems[cell]
            part: Part = {"identity": self.identity_of(cell, name) | {"server": server}}
            part["greedy"] = self._asked(client, every, 1, self._greedy)
            if count := self.samples(cell):
                part["sampled"] = self._asked(client, every, count, self._draws(cell))
            made = self.file(cell, name).with_suffix(".part")
            made.write_bytes(gzip.compress(json.dumps(part).encode(), 6, mtime=0))
            made.replace(self.file(cell, name))
            print(f"{name}: {cell[0]} {cell[1]}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    def _asked(self, client: Client, every: list[Problem], count: int, ask: Any) -> list[list[dict[str, Any]]]:
        """By problem, its ``count`` answers: text, tokens, whether the limit ended it."""
        found: list[list[dict[str, Any]]] = []
        for wave in waves(every, count, self.args.wave, self.args.kv_tokens):
            client.arm.flush()
            asked = [(problem, number) for problem in wave for number in range(count)]
            answers = [self._said(answer) for answer in ask(client, asked)]
            found += [answers[at : at + count] for at in range(0, len(answers), count)]
        return found

    def _said(self, answer: Answer) -> dict[str, Any]:
        cut = answer.ids[-1] not in self.stops
        text = self.tokenizer.decode(answer.ids if cut else answer.ids[:-1], skip_special_tokens=True)
        return {"text": text, "tokens": len(answer.ids), "cut": cut}

    def _greedy(self, client: Client, asked: list[tuple[Problem, int]]) -> list[Answer]:
        return client.greedy([problem.prompt for problem, _ in asked], [problem.limit for problem, _ in asked])

    def _draws(self, cell: Cell) -> Any:
        args = self.args

        def ask(client: Client, asked: list[tuple[Problem, int]]) -> list[Answer]:
            seeds = [zlib.crc32(f"{args.seed}/{cell}/{problem.id}/{number}".encode()) for problem, number in asked]
            prompts, limits = [p.prompt for p, _ in asked], [p.limit for p, _ in asked]
            return client.sampled(prompts, limits, seeds, args.temperature, args.top_p, args.top_k)

        return ask

    def figures(self, cell: Cell, part: Part) -> dict[str, list[float]]:
        """``{measure: [by problem]}``; graded here, in the main thread, which math-verify needs."""
        found: dict[str, list[float]] = {}
        for name in ("greedy", "sampled"):
            if name not in part:
                continue
            scores, cut, tokens = [], [], []
            for problem, answers in zip(self.problems[cell], part[name], strict=True):
                scores.append(sum(problem.grade(one["text"], one["cut"])[1] for one in answers) / len(answers))
                cut.append(sum(one["cut"] for one in answers) / len(answers))
                tokens.append(sum(one["tokens"] for one in answers) / len(answers))
            found |= {name: scores, f"{name}, cut off": cut, f"{name}, tokens": tokens}
        return found

    def report(self, arms: list[str]) -> dict[str, Any]:
        args = self.args
        parts = {cell: {arm: part for arm in arms if (part := self.stored(cell, arm))} for cell in self.cells}
        values = {cell: {arm: self.figures(cell, part) for arm, part in row.items()} for cell, row in parts.items()}
        pairs = [(arm, REFERENCE) for arm in arms if arm != REFERENCE]
        pairs += [pair for pair in BESIDE if {*pair} <= {*arms}]
        results: dict[str, Any] = {}
        for name in dict.fromkeys(family(cell) for cell in self.cells):
            for sampled in (False, True):
                chosen = {
                    cell: {
                        arm: {m: one for m, one in found.items() if m.startswith("sampled") == sampled}
                        for arm, found in row.items()
                    }
                    for cell, row in values.items()
                    if family(cell) == name and (not sampled or self.samples(cell))
                }
                if chosen:
                    kind = "sampled" if sampled else "greedy"
                    results[f"{name}, {kind}"] = analyse(chosen, pairs, (REFERENCE, WORST), args.seed, args.draws)
        known = parts[self.cells[0]][REFERENCE]["identity"]
        servers = {arm: part["identity"]["server"] for arm, part in parts[self.cells[0]].items()}
        made = measured_with(part["identity"] for row in parts.values() for part in row.values())
        said = {name: " and ".join(every) for name, every in made.items()}
        head = (
            f"{args.model.name} ({known['model']}): {', '.join(f'{t} {n}' for t, n in self.cells)}; "
            f"{args.samples} samples at T {args.temperature:g}, top-p {args.top_p:g}, top-k {args.top_k}; graded by "
            f"{math_grader()[0]}; GPU {said['gpu']}, SGLang {said['sglang']}, torch {said['torch']}, mixquant "
            f"{said['mixquant'] or 'none'}; emulated: {', '.join(made['emulated']) or 'nothing'}"
        )
        text = f"{head}\n\n{tables(results, arms)}\n"
        full = {"identity": {**known, "cell": None}, "servers": servers, "arms": arms, "results": results}
        row = parts[self.cells[0]]
        full |= {"measured_with": made, "recipes": {arm: part["identity"]["recipe"] for arm, part in row.items()}}
        (args.out / "results.json").write_text(json.dumps(full, indent=1) + "\n")
        (args.out / "tables.txt").write_text(text)
        print(text)
        short = {name: found["all"][name.rpartition(", ")[2]] for name, found in results.items()}
        return {"out": str(args.out), "arms": arms, "emulated": made["emulated"], "all": short}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = Run(args)
    arms = measured(run)
    print(json.dumps(run.report(arms)))


def command() -> None:
    started(main)
