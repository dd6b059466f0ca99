#!/usr/bin/env python3
"""LongBench v2 (arXiv 2412.15204) against a running server: 503 questions with four choices over 8k to 2M words.

--prompt direct, the default: text, question, choices, and the form of the answer, in one request; with thinking this is
what Mix-Quant ran (github.com/haiquanlu/Mix-Quant, evaluation/longbench-v2).  --prompt cot: LongBench's own two
requests, reasoning and then the choice.  Texts, question and choices included, that exceed --max-context tokens lose
their middle; Mix-Quant kept 100000 for Qwen3-8B and 120000 for the others.  After thinking, any of the usual phrases
counts as the answer, as in Mix-Quant's script; otherwise it must have LongBench's exact form.

    scripts/eval_longbench_v2 --out results/mix --data longbench_v2.json

Writes OUT/longbench_v2.jsonl (run.py); the same command goes on where it was cut short.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict, replace
from pathlib import Path

from scripts.public.data import Row, from_hub, rows_of
from scripts.public.grading import after_thinking, choice
from scripts.public.report import last_line, other_arm, show, summarise
from scripts.public.run import Example, Record, Records, run, start
from scripts.public.server import Sampling, Server, Tokenizer, arguments

NAME = "longbench_v2"
HUB = "THUDM/LongBench-v2"
FIELDS = ("_id", "context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer")
# The prompts of github.com/THUDM/LongBench (MIT), prompts/0shot*.txt.
FORM = 'Format your response as follows: "The correct answer is (insert answer here)".'
ASK = "What is the correct answer to this question: {}\nChoices:\n(A) {}\n(B) {}\n(C) {}\n(D) {}\n\n"
STEPS = "Let’s think step by step:"  # noqa: RUF001 - LongBench's own character
OMITTED = "Please read the following text and answer the questions below.\n\nThe text is too long and omitted here.\n\n"
CHOOSE = "Based on the above, what is the single, most likely answer choice? "
CHOICE_TOKENS = 128


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, "eval_longbench_v2", max_tokens=30720, temperature=0.6, thinking=True)
    parser.add_argument("--data", type=Path, metavar="FILE", help=f"local file (default: {HUB} on the hub)")
    parser.add_argument("--prompt", choices=["direct", "cot"], default="direct", help="default: %(default)s")
    parser.add_argument("--max-context", type=int, default=100_000, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--tokenizer", help="folder or hub name (default: the server's)")
    args: argparse.Namespace = parser.parse_args(argv)
    return args


def question(row: Row) -> str:
    return ASK.format(*(str(row[name]).strip() for name in FIELDS[2:7]))


def example(row: Row, prompt: str) -> Example:
    asked = "questions" if prompt == "cot" else "question"
    text = f"Please read the following text and answer the {asked} below.\n\n<text>\n"
    text += f"{str(row['context']).strip()}\n</text>\n\n"
    groups = tuple(str(row[name]) for name in ("difficulty", "length") if row.get(name))
    ending = STEPS if prompt == "cot" else FORM
    return Example(str(row["_id"]), text + question(row) + ending, str(row["answer"]).strip(), groups)


async def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sampling = Sampling.of(args)
    server = Server(args.base_url, args.model, args.api_key_env, args.timeout)
    tokenizer = Tokenizer(server, args.tokenizer)
    rows = (rows_of(args.data, FIELDS) if args.data else from_hub(HUB, None, "train", FIELDS))[: args.limit]
    questions = {str(row["_id"]): question(row) for row in rows}
    protocol = {"prompt": args.prompt, "max_context": args.max_context}
    identity = {"model": server.model, "server": server.identity(), "sampling": asdict(sampling), **protocol}
    lenient = args.thinking and args.prompt == "direct"
    one_at_a_time = asyncio.Lock()
    choosing = replace(sampling, max_tokens=CHOICE_TOKENS, thinking=False)

    async def work(example: Example, seed: int) -> Record:
        async with one_at_a_time:
            prompt = await asyncio.to_thread(tokenizer.cut_middle, example.prompt, args.max_context)
        said = await server.chat(prompt, sampling, seed)
        if args.prompt == "cot":
            steps = after_thinking(said["output"])
            prompt = f"{OMITTED}{questions[example.id]}{STEPS} {steps}\n\n{CHOOSE}{FORM}"
            said = {**said, "choice": (await server.chat(prompt, choosing, seed))["output"]}
        found = choice(said.get("choice", said["output"]), lenient)
        correct = found == example.answer
        return {**said, "extracted": found, "correct": correct, "score": float(correct)}

    records = Records(args.out / f"{NAME}.jsonl", {"benchmark": NAME, **identity})
    every = [example(row, args.prompt) for row in rows]
    other = other_arm(args.against, NAME)
    result = summarise(NAME, await run(NAME, every, args.seeds, records, work, args.concurrency), other)
    show(NAME, result, identity, f"{sampling}; prompt {args.prompt}, at most {args.max_context} prompt tokens")
    last_line({NAME: result}, identity, [records.file])


def command() -> None:
    start(main)
