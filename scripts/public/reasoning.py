#!/usr/bin/env python3
r"""MATH-500, AIME 2024, AIME 2025 and GSM8K against a running server, as Mix-Quant ran them.

One user message, "Put your final answer within \boxed{}." and the problem; thinking, T 0.6, top-p 0.95, top-k 20, up to
32768 tokens (github.com/haiquanlu/Mix-Quant, evaluation/reasoning).  The AIMEs have 30 problems each: give several
--seeds.  Grading: grading.py.

--shots N puts the last N problems of the file before each question, with their worked solutions, so that prefill has
something to do: prompts of GSM8K grow by some 150 tokens a shot.  They are the same for all questions and are not
asked themselves.  A radix cache prefills them once; a server with --disable-radix-cache reads them each time.

    scripts/eval_reasoning --out results/mix --datasets math500 aime24 --seeds 42 43 44
    scripts/eval_reasoning --out results/long --datasets gsm8k --shots 16 --temperature 0 --no-thinking --max-tokens 512
    scripts/eval_reasoning --out results/bf16 --datasets math500 --data MATH-500.jsonl --against results/mix

Writes OUT/DATASET.jsonl (run.py); the same command goes on where it was cut short.  The last line is JSON.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.public.data import Row, from_hub, rows_of
from scripts.public.grading import math_answer, math_grader
from scripts.public.report import last_line, other_arm, show, summarise
from scripts.public.run import Example, Record, Records, run, start
from scripts.public.server import Sampling, Server, Stop, arguments


@dataclass(frozen=True)
class DataSet:
    hub: str
    config: str | None
    split: str
    question: str = "problem"
    solution: str = ""  # worked, for --shots
    id: str = ""
    group: str = ""


DATASETS = {
    "math500": DataSet("HuggingFaceH4/MATH-500", None, "test", solution="solution", id="unique_id", group="level"),
    "aime24": DataSet("HuggingFaceH4/aime_2024", None, "train", id="id"),
    "aime25": DataSet("math-ai/aime25", None, "test", id="id"),
    "gsm8k": DataSet("openai/gsm8k", "main", "test", question="question", solution="answer"),
}


ASKED = "Put your final answer within \\boxed{}."


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, "eval_reasoning", max_tokens=32768, temperature=0.6, thinking=True)
    known = list(DATASETS)
    parser.add_argument("--datasets", nargs="+", choices=known, default=known[:3], help="default: all but gsm8k")
    parser.add_argument("--data", nargs="+", type=Path, metavar="FILE", help="local files, one for each of --datasets")
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each question (default: 0)")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.shots < 0:
        raise Stop(f"--shots: {args.shots} is less than 0")
    bare = [name for name in args.datasets if not DATASETS[name].solution]
    if args.shots and bare:
        raise Stop(f"--shots: {', '.join(bare)} has no worked solutions")
    if args.data and len(args.data) != len(args.datasets):
        raise Stop(f"--data: {len(args.data)} files for {len(args.datasets)} --datasets; give one for each")
    return args


def worked(rows: list[Row], data: DataSet) -> str:
    """Problems and solutions, as a question goes on behind them; GSM8K's "#### 18" becomes what is asked for."""
    made = []
    for row in rows:
        steps, mark, last = str(row[data.solution]).rpartition("####")
        solution = f"{steps.strip()}\n\\boxed{{{last.strip()}}}" if mark else last.strip()
        made.append(f"Problem: {row[data.question]}\nSolution: {solution}\n\n")
    return "".join(made)


def examples(rows: list[Row], data: DataSet, shots: int = 0) -> list[Example]:
    """One for each row but the last ``shots``, which are worked in the prompt of every other."""
    if shots >= len(rows):
        raise Stop(f"--shots: {shots} of {len(rows)} problems leave none to ask")
    before = worked(rows[len(rows) - shots :], data)
    rows = rows[: len(rows) - shots]
    ids = [str(row[data.id]) for row in rows] if all(data.id in row for row in rows) else []
    if len({*ids}) < len(rows):
        ids = [str(place) for place in range(len(rows))]
    made = []
    for name, row in zip(ids, rows, strict=True):
        answer = str(row["answer"]).rpartition("####")[2].strip()  # of GSM8K's worked solution
        groups = (f"{data.group} {row[data.group]}",) if data.group and row.get(data.group) is not None else ()
        question = f"{ASKED}\n\n{before}Problem: {row[data.question]}" if before else f"{ASKED}\n{row[data.question]}"
        made.append(Example(name, question, answer, groups))
    return made


async def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sampling = Sampling.of(args)
    server = Server(args.base_url, args.model, args.api_key_env, args.timeout)
    grader, same = math_grader()
    identity = {"model": server.model, "server": server.identity(), "sampling": asdict(sampling), "grader": grader}

    async def work(example: Example, seed: int) -> Record:
        said = await server.chat(example.prompt, sampling, seed)
        found = math_answer(said["output"], cut_off=said["finish"] == "length")
        correct = found is not None and same(found, example.answer)
        return {**said, "extracted": found, "correct": correct, "score": float(correct)}

    data: dict[str, list[Example]] = {}
    for place, name in enumerate(args.datasets):
        one = DATASETS[name]
        fields = (one.question, "answer", *((one.solution,) if args.shots else ()))
        rows = rows_of(args.data[place], fields) if args.data else from_hub(one.hub, one.config, one.split, fields)
        data[name] = examples(rows, one, args.shots)[: args.limit]
    others = {name: other_arm(args.against, name) for name in data}
    results: dict[str, Any] = {}
    for name, every in data.items():
        records = Records(args.out / f"{name}.jsonl", {"benchmark": name, **identity})
        found = await run(name, every, args.seeds, records, work, args.concurrency)
        results[name] = summarise(name, found, others[name])
        show(name, results[name], identity, f"{sampling}; {args.shots} worked examples; graded by {grader}")
    last_line(results, identity, [args.out / f"{name}.jsonl" for name in results])


def command() -> None:
    start(main)
