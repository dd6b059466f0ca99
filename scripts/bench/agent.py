#!/usr/bin/env python3
"""Agents through several servers: many turns, long tool results, short answers, a prefix that grows.

N agents talk to a server at a time.  All share a system prompt; in each turn an agent sends its whole conversation with
one more tool result, and the server answers with a given number of tokens.  What the server generated is part of the
next prompt, token for token, so that RadixAttention serves all but the new tool result.  Token ids and lengths come
from a seed: all arms get the same work, each round and level another one.  When an agent has ended, the next one takes
its place, until all conversations of the level are through; no agent thinks between turns.

Every arm is a real SGLang server with a bounded KV pool; all are up at once, but one at a time is at work, and the
others are stopped meanwhile, since idle ones spin on the CPU (--idle; servers of --url are left alone).  Each level
starts with an empty cache, and the order of the arms alternates.  What the client sees, HTTP included; medians over the
rounds:

    ttft     ms from sending a prompt to the first token: p50 and p95 over the level's requests
    itl      ms between tokens, gap between streamed chunks / tokens of the chunk: mean and p95 over the level's tokens
    latency  ms from sending a prompt to the last token: p50 and p95 over the level's requests
    tok/s    generated tokens of the level / its time
    cached   prompt tokens that the cache served / prompt tokens (agents beyond the KV pool push each other out of it)

    tok/s/GPU  the same by the number of GPUs that serve

Arms: stock-bf16 and stock-fp8 (SGLang without mixquant), or the name or file of a recipe; and, by --url, what is up
already: a prefill/decode pair (scripts/serve_pd), or several servers behind a router (docs/pd.md).
Prints a table per level; (1.2x) is 1.2 times as good as the first arm.  The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import aiohttp

from scripts.bench import running, turns
from scripts.bench.client import Answer, ask, encode, percentile
from scripts.bench.running import Running
from scripts.bench.servers import Arm, add_arguments, in_turn, machine, prepare, serving

Measures = dict[str, float]
UNITS = {
    "ttft_p50_ms": "ttft p50",
    "ttft_p95_ms": "ttft p95",
    "itl_mean_ms": "itl mean",
    "itl_p95_ms": "itl p95",
    "latency_p50_ms": "latency p50",
    "latency_p95_ms": "latency p95",
    "output_tokens_per_s": "tok/s",
    "output_tokens_per_s_per_gpu": "tok/s/GPU",
    "cache_hit_rate": "cached",
}


@dataclass(frozen=True)
class Shape:
    """What a level's conversations look like; ranges are inclusive."""

    agents: int
    turns: int
    system_tokens: int
    tool_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    vocab: int


@dataclass(frozen=True)
class Turn:
    tool: bytes  # token ids as JSON without brackets: encoded before the clock runs
    tool_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    system: bytes
    agents: tuple[tuple[Turn, ...], ...]

    def longest(self, system_tokens: int) -> int:
        """Tokens of the longest conversation at its end."""
        return system_tokens + max(sum(t.tool_tokens + t.output_tokens for t in turns) for turns in self.agents)


def make_workload(shape: Shape, seed: str) -> Workload:
    rng = random.Random(seed)
    vocab = range(10, shape.vocab)

    def turn() -> Turn:
        tool, output = rng.randint(*shape.tool_tokens), rng.randint(*shape.output_tokens)
        return Turn(encode(rng.choices(vocab, k=tool)), tool, output)

    system = encode(rng.choices(vocab, k=shape.system_tokens))
    return Workload(system, tuple(tuple(turn() for _ in range(shape.turns)) for _ in range(shape.agents)))


def summarise(answers: list[Answer], wall_s: float, gpus: int = 1) -> Measures:
    tokens_per_s = sum(len(answer.ids) for answer in answers) / wall_s
    ttft = [1e3 * answer.ttft for answer in answers]
    latency = [1e3 * answer.latency for answer in answers]
    itl = [1e3 * gap / tokens for answer in answers for gap, tokens in answer.gaps for _ in range(tokens)]
    return {
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p95_ms": percentile(ttft, 95),
        "itl_mean_ms": statistics.fmean(itl),
        "itl_p95_ms": percentile(itl, 95),
        "latency_p50_ms": percentile(latency, 50),
        "latency_p95_ms": percentile(latency, 95),
        "output_tokens_per_s": tokens_per_s,
        "output_tokens_per_s_per_gpu": tokens_per_s / gpus,
        "cache_hit_rate": sum(a.cached_tokens for a in answers) / sum(a.prompt_tokens for a in answers),
    }


async def play(url: str, work: Workload, concurrency: int) -> tuple[list[Answer], float]:
    """All conversations of ``work``, ``concurrency`` at a time; their answers, and the seconds they took.  To several
    URLs (by commas) the conversations go in turn, each to one."""
    answers: list[Answer] = []
    waiting = iter(zip(itertools.cycle(url.split(",")), work.agents, strict=False))

    async def agent(session: aiohttp.ClientSession) -> None:
        for server, conversation in waiting:
            prompt = work.system
            for turn in conversation:
                prompt += b"," + turn.tool
                answer = await ask(session, f"{server}/generate", prompt, turn.output_tokens)
                prompt += b"," + encode(answer.ids)
                answers.append(answer)

    timeout = aiohttp.ClientTimeout(total=None, sock_read=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.perf_counter()
        await asyncio.gather(*(agent(session) for _ in range(concurrency)))
        return answers, time.perf_counter() - began


def level(arm: Arm | Running, work: Workload, concurrency: int) -> tuple[Measures, float]:
    """One level on one arm, from an empty cache."""
    arm.flush()
    try:
        answers, wall_s = asyncio.run(play(arm.url, work, concurrency))
    except (aiohttp.ClientError, RuntimeError, TimeoutError, asyncio.TimeoutError) as error:
        raise arm.failed(f"failed at concurrency {concurrency}: {error!r}") from None
    return summarise(answers, wall_s, arm.gpus), wall_s


def measure(
    arms: list[Arm | Running], shapes: dict[int, Shape], args: argparse.Namespace
) -> dict[str, dict[str, list[Measures]]]:
    """``{arm: {concurrency: [measures of a round]}}``."""
    found: dict[str, dict[str, list[Measures]]] = {arm.name: {str(n): [] for n in shapes} for arm in arms}
    most = max(shapes)
    warm_up = make_workload(replace(shapes[most], agents=most, turns=min(2, args.turns)), f"{args.seed} warm-up")
    for arm in arms:
        with turns.alone(arm, arms, args.idle):
            _, wall_s = level(arm, warm_up, most)
        print(f"warm-up, concurrency {most}, {arm.name}: {wall_s:.1f} s", file=sys.stderr, flush=True)
    for round_number in range(args.rounds):
        order = in_turn(arms, round_number)
        for concurrency, shape in shapes.items():
            work = workload_of(shape, args.seed, round_number, concurrency)
            for arm in order:
                with turns.alone(arm, arms, args.idle):
                    measures, wall_s = level(arm, work, concurrency)
                found[arm.name][str(concurrency)].append(measures)
                said = f"round {round_number + 1}, concurrency {concurrency}, {arm.name}: {wall_s:.1f} s"
                print(said, file=sys.stderr, flush=True)
    return found


def workload_of(shape: Shape, seed: int, round_number: int, concurrency: int) -> Workload:
    """The same for every arm, another one for each round and level."""
    return make_workload(shape, f"{seed} round {round_number} concurrency {concurrency}")


def medians(rounds: list[Measures]) -> Measures:
    return {key: statistics.median(measures[key] for measures in rounds) for key in UNITS}


def table(results: dict[str, Measures]) -> str:
    """Arms by measures; in brackets how many times as good as the first arm."""
    first = next(iter(results.values()))
    lines = [f"{'arm (ms)':<18}" + "".join(f"{title:>20}" for title in UNITS.values())]
    for name, found in results.items():
        cells = []
        for key, value in found.items():
            if key == "cache_hit_rate":
                cells.append(f"{value:.1%}")
                continue
            better = value / first[key] if key.startswith("output_tokens") else first[key] / value
            cells.append(f"{value:.2f} ({better:.3f}x)")
        lines.append(f"{name:<18}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[int, Shape]]:
    """The arguments, and each level's shape by its concurrency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--concurrency", nargs="+", type=int, default=[1, 8, 32], help="levels: agents at a time (default: %(default)s)"
    )
    add("--agents", type=int, help="conversations per level (default: 2 x concurrency, at least 4)")
    add("--turns", type=int, default=6, help="of a conversation (default: %(default)s)")
    add(
        "--system-tokens",
        type=int,
        default=2048,
        help="system prompt and tools, shared by all agents (default: %(default)s)",
    )
    spread: dict[str, Any] = {"nargs": 2, "type": int, "metavar": ("MIN", "MAX")}
    add("--tool-tokens", default=[512, 4096], help="new tokens in each turn, uniform (default: %(default)s)", **spread)
    add("--output-tokens", default=[32, 128], help="generated in each turn, uniform (default: %(default)s)", **spread)
    add_arguments(parser, rounds=3, kv_tokens=150000)
    running.add_argument(parser)
    args = parser.parse_args(argv)
    running.read(args, parser)
    args.concurrency = sorted({*args.concurrency})
    for flag, (low, high), least in (("tool", args.tool_tokens, 1), ("output", args.output_tokens, 2)):
        if not least <= low <= high:
            parser.error(f"argument --{flag}-tokens: {low} {high}: MIN is at least {least}, MAX at least MIN")
    if min(args.turns, args.system_tokens, args.concurrency[0]) < 1:
        parser.error("arguments --turns, --system-tokens, --concurrency: at least 1")
    if args.agents is not None and args.agents < args.concurrency[-1]:
        parser.error(f"argument --agents: {args.agents} cannot fill concurrency {args.concurrency[-1]}")
    prepare(args, parser)
    fixed = (args.turns, args.system_tokens, tuple(args.tool_tokens), tuple(args.output_tokens), args.vocab)
    shapes = {n: Shape(args.agents or max(4, 2 * n), *fixed) for n in args.concurrency}
    longest = max(
        workload_of(shape, args.seed, round_number, n).longest(args.system_tokens)
        for n, shape in shapes.items()
        for round_number in range(args.rounds)
    )
    if longest > args.kv_tokens:
        parser.error(f"argument --kv-tokens: {args.kv_tokens} hold no conversation of {longest} tokens")
    return args, shapes


def main() -> None:
    args, shapes = parse()
    with serving(args, timed=False) as started:
        found = measure([*started, *args.running], shapes, args)
    results = {name: {n: medians(rounds) for n, rounds in levels.items()} for name, levels in found.items()}
    for concurrency, shape in shapes.items():
        print(f"concurrency {concurrency}: {shape.agents} agents, {shape.turns} turns each")
        print(table({name: levels[str(concurrency)] for name, levels in results.items()}) + "\n")
    facts = {
        **machine(),
        "rounds": args.rounds,
        "seed": args.seed,
        "kv_tokens": args.kv_tokens,
        "flags": args.flags,
        "idle": args.idle,
        "workload": {str(n): asdict(shape) for n, shape in shapes.items()},
        "baseline": next(iter(found)),
        "gpus": {arm.name: arm.gpus for arm in [*started, *args.running]},
        "medians": results,
        "by_round": found,
    }
    print(json.dumps(facts))


def command() -> None:
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
