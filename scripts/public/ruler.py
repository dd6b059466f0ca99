#!/usr/bin/env python3
"""RULER (arXiv 2404.06654) against a running server: 13 tasks of retrieval, tracing and counting at chosen lengths.

The prompts are made here (ruler_tasks.py).  A length counts the tokens of prompt, chat template and answer.  As in
RULER's own runs the answer is begun for the model ("The special magic number ... is"), greedy and without thinking;
--no-prefix leaves that away, for endpoints that cannot go on with a message, and --thinking does too.  A score is the
share of the references that the answer holds.  --limit: prompts of each task and length (default 100).

    scripts/eval_ruler --out results/mix --lengths 4096 8192 16384 32768 --limit 500 --essays essays.txt

Writes OUT/ruler-LENGTH.jsonl (run.py); the same command goes on where it was cut short.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm  # type: ignore[import-untyped]

from scripts.public.grading import after_thinking
from scripts.public.report import last_line, other_arm, show, summarise
from scripts.public.ruler_tasks import TASKS, Material, fit, make, material, score
from scripts.public.run import Example, Record, Records, run, start
from scripts.public.server import Sampling, Server, Stop, Tokenizer, arguments

TEMPLATE_TOKENS = 32  # room for the chat template


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, "eval_ruler", max_tokens=None, temperature=0.0, thinking=False)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[4096], help="tokens (default: %(default)s)")
    add("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=f"{', '.join(TASKS)} (default: all with data)")
    add("--essays", type=Path, metavar="FILE", help="text for the haystacks of `essay` tasks (default: RULER's noise)")
    add("--words", type=Path, metavar="FILE", help="words, separated by space (default: made of syllables)")
    add("--squad", type=Path, metavar="FILE", help="SQuAD 2.0 JSON, for qa_1")
    add("--hotpotqa", type=Path, metavar="FILE", help="HotpotQA JSON, for qa_2")
    add("--data-seed", type=int, default=42, help="of the prompts (default: %(default)s)")
    add("--prefix", action=argparse.BooleanOptionalAction, default=True, help="begin the answer for the model")
    add("--tokenizer", help="folder or hub name (default: the server's)")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.thinking and not args.max_tokens:
        raise Stop("--thinking: RULER's answers have 30 to 128 tokens; give room for thoughts with --max-tokens")
    args.limit = args.limit or 100
    args.prefix = args.prefix and not args.thinking
    has_file = {"qa_1": args.squad, "qa_2": args.hotpotqa}
    missing = [name for name in args.tasks or () if name in has_file and not has_file[name]]
    if missing:
        raise Stop(f"--tasks {missing[0]}: needs a local file, --{'squad' if missing[0] == 'qa_1' else 'hotpotqa'}")
    args.tasks = args.tasks or [name for name in TASKS if has_file.get(name, True)]
    return args


class Counts(Protocol):
    """Whatever tells how many tokens a text has."""

    def count(self, text: str) -> int: ...


def prompts(name: str, length: int, args: argparse.Namespace, source: Material, tokenizer: Counts) -> list[Example]:
    """The examples of a task: the largest size that fits, less where one has longer words."""
    task = TASKS[name]
    most = length - TEMPLATE_TOKENS - (args.max_tokens or task.tokens)

    def tokens(size: int, nth: int = 0) -> int:
        question, prefix, _ = make(name, size, length, nth, args.data_seed, source)
        return tokenizer.count(f"{question} {prefix}")

    size = fit(most, task.least, tokens)
    if size is None:
        raise Stop(f"--lengths {length}: {name} needs {tokens(task.least) + length - most} tokens at least")
    made = []
    for nth in tqdm(range(args.limit), desc=f"prompts of {name}, {length}", file=sys.stderr, leave=False):
        fitting = size
        while fitting > task.least and tokens(fitting, nth) > most:
            fitting = max(task.least, fitting - max(1, size // 50))
        question, prefix, references = make(name, fitting, length, nth, args.data_seed, source)
        made.append(Example(f"{name}-{nth}", question, references, (name,), prefix if args.prefix else ""))
    return made


async def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sampling = Sampling.of(args)
    source = material(args.essays, args.words, args.squad, args.hotpotqa)
    server = Server(args.base_url, args.model, args.api_key_env, args.timeout)
    tokenizer = Tokenizer(server, args.tokenizer)
    made_of = {"essays": "file" if source.essay else "noise", "words": "file" if args.words else "syllables"}
    identity = {"model": server.model, "server": server.identity(), "sampling": asdict(sampling), **made_of}

    async def work(example: Example, seed: int) -> Record:
        name = example.groups[0]
        said = await server.chat(
            example.prompt, replace(sampling, max_tokens=args.max_tokens or TASKS[name].tokens), seed, example.prefix
        )
        found, share = score(name, after_thinking(said["output"]), example.answer)
        return {**said, "extracted": found, "correct": share == 1, "score": share}

    others = {length: other_arm(args.against, f"ruler-{length}") for length in args.lengths}
    results: dict[str, Any] = {}
    for length in args.lengths:
        name = f"ruler-{length}"
        records = Records(args.out / f"{name}.jsonl", {"benchmark": name, **identity, "data_seed": args.data_seed})
        every = [one for task in args.tasks for one in prompts(task, length, args, source, tokenizer)]
        found = await run(name, every, args.seeds, records, work, args.concurrency)
        results[name] = summarise(name, found, others[length])
        how = f"{length} tokens, {'greedy' if not sampling.temperature else sampling}, "
        how += f"essay haystacks: {made_of['essays']}, words: {made_of['words']}"
        show(name, results[name], identity, how)
    last_line(results, identity, [args.out / f"{name}.jsonl" for name in results])


def command() -> None:
    start(main)
