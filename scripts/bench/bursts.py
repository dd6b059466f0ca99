#!/usr/bin/env python3
"""Many short prompts at once, and odd passes: where a server may fall off a cliff, side by side with others on one GPU.

Arms are those of bench_prefill: real servers, all up at once, each in turn in every round, the others stopped (--idle).
Prompts are random token ids, new for every request.  What is asked:

    burst     N prompts of L tokens (--counts, --tokens) in one request of /generate, which a server is made to take in
              as one (SGLANG_ENABLE_COLOCATED_BATCH_GEN, in every arm); one token each
    logprobs  --logprobs: one prompt of --lengths with the logprobs of all its tokens
    cached    --cached N: N prompts of --lengths a second time, so that all but the last token of each is in the cache
    bf16      --bf16-requests: one prompt of --lengths that asks for a BF16 prefill; of stock SGLang, which knows no
              such wish, without
    beside    --beside N: one prompt of --lengths while N answers are under way.  With --enable-mixed-chunk among the
              servers' flags their decode steps ride on its passes

Medians over the rounds:

    request   client: milliseconds until the whole answer, HTTP included; beside: until the first token
    pass      server: milliseconds of its prefill passes, by CUDA events around the model runner (passes.py)
    passes    how many these were: a burst beyond --chunked-prefill-size takes several

Prints tables; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

from scripts.bench import turns
from scripts.bench.prompts import NewPrompts
from scripts.bench.servers import Arm, add_arguments, in_turn, machine, prepare, serving
from scripts.bench.streams import under_way

BF16 = {"custom_params": {"mixquant": {"prefill": "bf16"}}}
STREAM_PROMPT, STREAM_TOKENS = 256, 512  # of the answers that are under way
UNITS = {"request": "ms", "pass": "ms", "passes": "number"}

Times = dict[str, dict[str, dict[str, float]]]  # arm -> case -> request, pass, passes


@dataclass(frozen=True)
class Case:
    """``count`` prompts of ``tokens`` tokens; ``beside``: while so many answers are under way."""

    mode: str
    tokens: int
    count: int = 1
    beside: int = 0

    @property
    def key(self) -> str:
        return f"{self.mode}_{self.column}"

    @property
    def column(self) -> str:
        return f"{self.count}x{self.tokens}" + (f"+{self.beside}" if self.beside else "")

    @property
    def group(self) -> str:
        return f"{self.mode}, {self.tokens} tokens each" if self.mode == "burst" else self.mode

    @property
    def kv_tokens(self) -> int:
        """That it has in the cache at once."""
        return self.count * (self.tokens + 1) + self.beside * (STREAM_PROMPT + STREAM_TOKENS)

    def ask(self, arm: Arm, prompts: NewPrompts, rest: float) -> dict[str, float]:
        """Seconds, and the number of passes."""
        asked = [prompts.of(self.tokens) for _ in range(self.count)]
        more: dict[str, Any] = {}
        if self.mode == "logprobs":
            more = {"return_logprob": True, "logprob_start_len": 0}
        elif self.mode == "bf16" and not arm.name.startswith("stock-"):
            more = BF16
        cached = 0
        if self.mode == "cached":
            arm.generate(asked, 1)
            cached = self.tokens - 1
        if not self.beside:
            time.sleep(rest)
            return self._timed(arm, asked, cached, more)
        with under_way(arm, [prompts.of(STREAM_PROMPT) for _ in range(self.beside)], STREAM_TOKENS) as streams:
            time.sleep(rest)  # their own passes are written down by then
            found = self._timed(arm, asked, cached, more)
            streams.check()
        return found

    def _timed(self, arm: Arm, asked: list[list[int]], cached: int, more: dict[str, Any]) -> dict[str, float]:
        mark = arm.mark()
        spent, metas = arm.generate(asked, 1, **more)
        if wrong := {meta["cached_tokens"] for meta in metas} - {cached}:
            raise SystemExit(f"{arm.name}, {self.key}: it had {wrong} tokens of a prompt in its cache, not {cached}")
        passes = arm.passes(mark, self.count * (self.tokens - cached), self.beside)
        return {"request": spent, "pass": sum(passes), "passes": len(passes)}


def cases(args: argparse.Namespace) -> list[Case]:
    found = [Case("burst", tokens, count) for tokens in args.tokens for count in args.counts]
    found += [Case("logprobs", length) for length in args.lengths if args.logprobs]
    found += [Case("cached", length, count) for length in args.lengths for count in args.cached]
    found += [Case("bf16", length) for length in args.lengths if args.bf16_requests]
    return found + [Case("beside", length, 1, count) for length in args.lengths for count in args.beside]


def measure(arms: list[Arm], asked: list[Case], args: argparse.Namespace) -> Times:
    """Medians; times in milliseconds."""
    prompts = NewPrompts(args.seed, args.vocab)
    seen: dict[str, dict[str, list[dict[str, float]]]] = {arm.name: {} for arm in arms}
    for round_number in range(args.rounds + 1):  # the first round warms up
        for case in asked:
            for arm in in_turn(arms, round_number):
                with turns.alone(arm, arms, args.idle):
                    found = case.ask(arm, prompts, args.rest)
                if round_number:
                    seen[arm.name].setdefault(case.key, []).append(found)
    return {arm: {key: _medians(found) for key, found in by_case.items()} for arm, by_case in seen.items()}


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    medians = {what: statistics.median(one[what] for one in found) for what in UNITS}
    return {what: 1e3 * value if UNITS[what] == "ms" else value for what, value in medians.items()}


def tables(asked: list[Case], results: Times) -> list[str]:
    """Lines: for each group of cases a table of each figure; the first arm is what others are compared with."""
    first, lines = next(iter(results.values())), []
    for group in dict.fromkeys(case.group for case in asked):
        columns = [case for case in asked if case.group == group]
        lines.append(group)
        for what, unit in UNITS.items():
            lines.append(f"  {f'{what} ({unit})':<20}" + "".join(f"{case.column:>18}" for case in columns))
            for arm, found in results.items():
                values = [(found[case.key][what], first[case.key][what]) for case in columns]
                if unit == "ms":
                    cells = [f"{value:9.2f} ({base / value:.3f}x)" for value, base in values]
                else:
                    cells = [f"{value:g}" for value, _ in values]
                lines.append(f"  {arm:<20}" + "".join(f"{cell:>18}" for cell in cells))
        lines.append("")
    return lines


def read(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Case]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(name: str, default: list[int], what: str, nargs: str = "*") -> None:
        parser.add_argument(name, nargs=nargs, type=int, default=default, help=f"{what} (default: %(default)s)")

    several("--counts", [1, 8, 16, 17, 32, 64, 65, 128, 256], "prompts of a burst; none: no bursts")
    several("--tokens", [64, 256], "tokens of each of its prompts")
    several("--lengths", [512, 2048], "tokens of a prompt of the other modes", "+")
    parser.add_argument("--logprobs", action="store_true", help="prompts with the logprobs of their tokens")
    several("--cached", [], "so many prompts a second time")
    parser.add_argument("--bf16-requests", action="store_true", help="prompts that ask for a BF16 prefill")
    several("--beside", [], "a prompt while so many answers are under way")
    rest = "seconds before each request in which nothing new is asked (default: %(default)s)"
    parser.add_argument("--rest", type=float, default=0.2, help=rest)
    add_arguments(parser, rounds=6, kv_tokens=70000)
    parser.set_defaults(arms=["stock-bf16", "fp8"])
    args = parser.parse_args(argv)
    for name in ("counts", "tokens", "lengths", "cached", "beside"):
        if any(value < 1 for value in getattr(args, name)):
            parser.error(f"argument --{name}: at least 1")
    if args.cached and min(args.lengths) < 2:
        parser.error("argument --lengths: at least 2 with --cached, or there is nothing to cache")
    asked = [*dict.fromkeys(cases(args))]
    if not asked:
        parser.error("nothing is asked: no --counts, and no other mode")
    for case in asked:
        if case.kv_tokens > args.kv_tokens:
            parser.error(f"argument --kv-tokens: {case.key} needs {case.kv_tokens}, and there are {args.kv_tokens}")
    prepare(args, parser)
    return args, asked


def main() -> None:
    args, asked = read()
    os.environ["SGLANG_ENABLE_COLOCATED_BATCH_GEN"] = "1"  # a batch waits until all of it has come
    with serving(args, timed=True) as arms:
        results = measure(arms, asked, args)
    print("\n".join(tables(asked, results)))
    print(f"servers that were not asked: {args.idle}; their flags: {' '.join(args.flags) or 'none'}")
    how = {"rounds": args.rounds, "idle": args.idle, "flags": args.flags, "baseline": args.arms[0]}
    print(json.dumps({**machine(), **how, "found": results}))


def command() -> None:
    main()
