#!/usr/bin/env python3
r"""MATH-500, AIME 2024, AIME 2025 and GSM8K against a running server, as Mix-Quant ran them.

One user message, "Put your final answer within \boxed{}." and the problem; thinking, T 0.6, top-p 0.95, top-k 20, up to
32768 tokens (github.com/haiquanlu/Mix-Quant, evaluation/reasoning).  The AIMEs have 30 problems each: give several
--seeds.  Grading: grading.py.

    scripts/eval_reasoning --out results/mix --datasets math500 aime24 --seeds 42 43 44
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
    id: str = ""
    group: str = ""


DATASETS = {
    "math500": DataSet("HuggingFaceH4/MATH-500", None, "test", id="unique_id", group="level"),
    "aime24": DataSet("HuggingFaceH4/aime_2024", None, "train", id="id"),
    "aime25": DataSet("math-ai/aime25", None, "test", id="id"),
    "gsm8k": DataSet("openai/gsm8k", "main", "test", question="question"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, "eval_reasoning", max_tokens=32768, temperature=0.6, thinking=True)
    known = list(DATASETS)
    parser.add_argument("--datasets", nargs="+", choices=known, default=known[:3], help="default: all but gsm8k")
    parser.add_argument("--data", nargs="+", type=Path, metavar="FILE", help="local files, one for each of --datasets")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.data and len(args.data) != len(args.datasets):
        raise Stop(f"--data: {len(args.data)} files for {len(args.datasets)} --datasets; give one for each")
    return args


def examples(rows: list[Row], data: DataSet) -> list[Example]:
    ids = [str(row[data.id]) for row in rows] if all(data.id in row for row in rows) else []
    if len({*ids}) < len(rows):
        ids = [str(place) for place in range(len(rows))]
    made = []
    for name, row in zip(ids, rows, strict=True):
        answer = str(row["answer"]).rpartition("####")[2].strip()  # of GSM8K's worked solution
        groups = (f"{data.group} {row[data.group]}",) if data.group and row.get(data.group) is not None else ()
        made.append(Example(name, f"Put your final answer within \\boxed{{}}.\n{row[data.question]}", answer, groups))
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
        fields = (one.question, "answer")
        rows = rows_of(args.data[place], fields) if args.data else from_hub(one.hub, one.config, one.split, fields)
        data[name] = examples(rows[: args.limit], one)
    others = {name: other_arm(args.against, name) for name in data}
    results: dict[str, Any] = {}
    for name, every in data.items():
        records = Records(args.out / f"{name}.jsonl", {"benchmark": name, **identity})
        found = await run(name, every, args.seeds, records, work, args.concurrency)
        results[name] = summarise(name, found, others[name])
        show(name, results[name], identity, f"{sampling}; graded by {grader}")
    last_line(results, identity, [args.out / f"{name}.jsonl" for name in results])


def command() -> None:
    start(main)
