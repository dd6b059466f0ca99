#!/usr/bin/env python3
"""Requests of a real service, replayed to several servers: when they came, how long they were, what they shared.

FILE is Mooncake's JSONL or Azure's 2023 CSV (see bench/traffic.py).  Requests are sent when they are due, whatever
became of those before (open loop): at the file's times (--speed), or at so many a second (--rate, several in turn).
Every arm is a real SGLang server with a bounded KV pool; all are up at once, but one at a time is at work, and the
others are stopped meanwhile (--idle; not those of --url).  Each replay starts with an empty cache; arms alternate; a
round has other token ids.  What the client sees, HTTP included; medians over the rounds:

    ttft     ms from the time that a request was due to its first token: p50, p95, p99 over the answered requests
    itl      ms between tokens, gap between streamed chunks / tokens of the chunk: p50, p95, p99 over all tokens
    latency  ms from the time that a request was due to its last token
    req/s, tok/s, tok/s/GPU   whole answers, and their tokens, until the last one ended
    cached   prompt tokens that the cache served / prompt tokens of the answered (an endless cache: in the heading)
    slo      requests with ttft <= --slo-ttft and mean itl <= --slo-itl / all that were sent
    goodput  such requests a second
    late     ms from when requests were due to when they were sent, p99: what the client itself adds, in ttft too
    refused  the server was too busy to begin (429, 503); failed: anything else but a whole answer, one not whole within
             --request-limit included.  Sums over the rounds, reasons below the table.  Arms that answer unlike numbers
             of requests are compared by slo and goodput alone: the others are those of the answered

Arms: stock-bf16 and stock-fp8 (SGLang without mixquant), or the name or file of a recipe; and, by --url, what is up
already.  Prints a table per rate; (1.2x) is 1.2 times as good as the first arm.  The last line of stdout is JSON.

sglang.bench_serving (0.5.17, 0.5.23) replays no trace in this sense.  Its --dataset-name mooncake sends 128 words for a
block, whatever input_length says, and tokenizes while the clock runs; --use-trace-timestamps changes the label of the
result only; its client reads text, so it cannot measure servers with --skip-tokenizer-init; an answer shorter than
asked counts as whole.  The client here is bench_agent's (bench/client.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from mixquant_sglang.tools.progress import Bar
from scripts.bench import distributions, running, traffic, turns
from scripts.bench.client import Refused, answer_of, send
from scripts.bench.outcomes import Level, Outcome, Slo, medians, summarise, table
from scripts.bench.running import Running
from scripts.bench.servers import Arm, add_arguments, in_turn, machine, prepare, serving
from scripts.bench.traffic import Prompts, Request, Traffic

INCREMENTAL = "--incremental-streaming-output"  # else each chunk has all tokens so far, and the client has to read them
SPARE = 8  # places that SGLang leaves free at the end of a context
WARM_UP = 8  # requests


async def play(
    url: str, requests: tuple[Request, ...], due: list[float], prompts: Prompts, limit_s: float, bar: Any
) -> tuple[list[Outcome], float]:
    """Sends all of ``requests`` when they are ``due``; what came of each, and the seconds until the last one ended.

    Streams are read through only when all have ended: the client is to have nothing else to do while tokens come."""
    timeout = aiohttp.ClientTimeout(total=limit_s)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        began = time.perf_counter()

        async def one(request: Request, body: bytes) -> Any:
            sent = time.perf_counter()
            try:
                return sent, await send(session, f"{url}/generate", body, request.output_tokens)
            except asyncio.TimeoutError:
                return sent, f"no whole answer within {limit_s:g} s"
            except (aiohttp.ClientError, OSError) as error:
                return sent, f"{type(error).__name__}: {error}"
            finally:
                bar.update()

        tasks = []
        for request, when in zip(requests, due, strict=True):
            body = prompts.encoded(request)
            await asyncio.sleep(max(0, began + when - time.perf_counter()))
            tasks.append(asyncio.create_task(one(request, body)))
        came = await asyncio.gather(*tasks)
        wall_s = time.perf_counter() - began
    outcomes = []
    for request, when, (sent, what) in zip(requests, due, came, strict=True):
        late = sent - began - when
        if isinstance(what, str):
            outcomes.append(Outcome(late, why=what[:300]))
            continue
        try:
            outcomes.append(Outcome(late, answer_of(what, began + when, request.output_tokens)))
        except RuntimeError as error:
            outcomes.append(Outcome(late, refused=isinstance(error, Refused), why=str(error)[:300]))
    return outcomes, wall_s


def replay(
    arm: Arm | Running, work: Traffic, due: list[float], prompts: Prompts, args: argparse.Namespace, said: str
) -> tuple[list[Outcome], float]:
    """One replay on one arm, from an empty cache.  Ends the benchmark where not one request is answered."""
    arm.flush()
    with Bar(total=len(work.requests), desc=f"{said}, {arm.name}", unit="req", leave=False) as bar:
        outcomes, wall_s = asyncio.run(play(arm.url, work.requests, due, prompts, args.request_limit, bar))
    lost = Level(outcomes=outcomes)
    if not any(one.answer for one in outcomes):
        raise arm.failed(f"answered none of {len(outcomes)} requests ({said}): {lost.reasons()}")
    counts = ", ".join(f"{n} {what}" for what, n in lost.lost().items() if n)
    print(f"{said}, {arm.name}: {wall_s:.1f} s{counts and ', ' + counts}", file=sys.stderr, flush=True)
    return outcomes, wall_s


def measure(arms: list[Arm | Running], work: Traffic, args: argparse.Namespace) -> dict[str, dict[str, Level]]:
    """``{rate: {arm: level}}``."""
    found = {rate: {arm.name: Level() for arm in arms} for rate in args.levels}
    first = Traffic(work.requests[:WARM_UP], work.block, work.of)
    prompts = Prompts(first, args.vocab, f"{args.seed} warm-up")
    for arm in arms:
        with turns.alone(arm, arms, args.idle):
            replay(arm, first, [0.0] * len(first.requests), prompts, args, "warm-up")
    for round_number in range(args.rounds):
        seed = f"{args.seed} round {round_number}"
        prompts = Prompts(work, args.vocab, seed)
        for rate, how in args.levels.items():
            due = traffic.due(work.requests, args.arrivals, seed, **how)
            for arm in in_turn(arms, round_number):
                with turns.alone(arm, arms, args.idle):
                    outcomes, wall_s = replay(arm, work, due, prompts, args, f"round {round_number + 1}, {rate}")
                level = found[rate][arm.name]
                level.rounds.append(summarise(outcomes, wall_s, args.slo, arm.gpus))
                level.outcomes += outcomes
    return found


def heading(work: Traffic, args: argparse.Namespace) -> str:
    some = work.requests
    prompt, output = [one.prompt_tokens for one in some], [one.output_tokens for one in some]
    lines = [
        f"{args.file.name}: {len(some)} of {work.of} requests, the first {args.skip} skipped; prompts of "
        f"{statistics.fmean(prompt):.0f} tokens on average, {max(prompt)} at most; answers of "
        f"{statistics.fmean(output):.0f}, {max(output)} at most; "
        f"an endless cache would serve {traffic.shared(work):.1%}"
    ]
    changed = [f"tokens of prompts x {args.scale_input:g}"] if args.scale_input != 1 else []
    changed += [f"tokens of answers x {args.scale_output:g}"] if args.scale_output != 1 else []
    changed += [f"{work.cut} cut to {args.longest} tokens"] if work.cut else []
    changed += [f"{work.dropped} of more than {args.longest} tokens dropped"] if work.dropped else []
    return "\n".join([*lines, *(["not as in the file: " + "; ".join(changed)] if changed else [])])


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Traffic]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--file", type=Path, required=True, help="the trace: .jsonl (Mooncake's) or .csv (Azure's)")
    pace = parser.add_mutually_exclusive_group(required=True)
    pace.add_argument("--rate", nargs="+", type=float, help="requests a second on average, one replay each")
    pace.add_argument("--speed", nargs="+", type=float, help="times as fast as the file, one replay each")
    add("--arrivals", choices=traffic.ARRIVALS, default="trace", help="the file's times, stretched; the same, but "
        "requests of one time spread until the next; or drawn (default: %(default)s)")  # fmt: skip
    add("--skip", type=int, default=0, help="requests at the file's beginning (default: %(default)s)")
    add("--limit", type=int, help="requests to replay (default: all)")
    add("--longest", type=int, help="tokens of a request, prompt and answer; longer prompts are cut at the end")
    add("--drop", action="store_true", help="requests longer than --longest are left out instead")
    add("--scale-input", type=float, default=1, help="tokens of prompts, times this (default: %(default)s)")
    add("--scale-output", type=float, default=1, help="tokens of answers, times this (default: %(default)s)")
    add("--slo-ttft", type=float, metavar="MS", help="limit of a request's time to first token")
    add("--slo-itl", type=float, metavar="MS", help="limit of a request's mean time between tokens")
    add("--request-limit", type=float, default=600, help="seconds a request may take (default: %(default)s)")
    add("--plot", type=Path, metavar="FILE", help="distributions of TTFT and ITL, .svg or .png")
    add_arguments(parser, rounds=1, kv_tokens=150000)
    running.add_argument(parser)
    args = parser.parse_args(argv)
    running.read(args, parser)
    for arm in args.running:
        if "," in arm.url:
            parser.error(f"argument --url: {arm.name}: one URL; which server gets a request is a router's to say")
    pace_of, values = ("rate", args.rate) if args.rate else ("speed", args.speed)
    if min(*values, args.scale_input, args.scale_output, args.request_limit) <= 0 or args.skip < 0:
        parser.error(
            "arguments --rate, --speed, --scale-input, --scale-output, --request-limit: more than 0; --skip: 0"
        )
    if (args.limit is not None and args.limit < 1) or (args.longest is not None and args.longest < 2):
        parser.error("argument --limit: at least 1; argument --longest: at least 2")
    if args.drop and args.longest is None:
        parser.error("argument --drop: needs --longest")
    args.levels = {f"{pace_of} {value:g}": {pace_of: value} for value in values}
    args.slo = Slo(args.slo_ttft, args.slo_itl)
    if args.plot and (wrong := distributions.missing(args.plot)):
        parser.error(f"argument --plot: {wrong}")
    prepare(args, parser)
    scales = {"scale_input": args.scale_input, "scale_output": args.scale_output}
    try:
        requests = traffic.read(args.file)
        work = traffic.take(requests, skip=args.skip, limit=args.limit, longest=args.longest, drop=args.drop, **scales)
        for how in args.levels.values():
            traffic.due(work.requests, args.arrivals, "", **how)
    except (OSError, traffic.BadTrace) as error:
        parser.error(f"argument --file: {error}")
    if args.arms:
        if INCREMENTAL not in args.flags:
            args.flags = [*args.flags, INCREMENTAL]
        room = min(args.kv_tokens, context(args)) - SPARE
        if work.longest > room:
            parser.error(f"argument --longest: a request has {work.longest} tokens, a server holds {room}")
    return args, work


def context(args: argparse.Namespace) -> int:
    """Tokens of the model's context, or of ``--context-length``; the KV pool where neither tells."""
    for flag, value in zip(args.flags, [*args.flags[1:], ""], strict=True):
        name, _, inline = flag.partition("=")
        if name == "--context-length":
            return int(inline or value)
    config = json.loads((args.model_path / "config.json").read_text())
    config = {**config, **config.get("text_config", {})}
    return int(config.get("max_position_embeddings") or args.kv_tokens)


def facts_of(found: dict[str, dict[str, Level]], work: Traffic, args: argparse.Namespace) -> dict[str, Any]:
    some = work.requests
    return {
        **machine(),
        "rounds": args.rounds,
        "seed": args.seed,
        "kv_tokens": args.kv_tokens,
        "flags": args.flags,
        "idle": args.idle,
        "file": args.file.name,
        "workload": {
            "requests": len(some),
            "of": work.of,
            "skipped": args.skip,
            "longest": args.longest,
            "cut": work.cut,
            "dropped": work.dropped,
            "scale_input": args.scale_input,
            "scale_output": args.scale_output,
            "prompt_tokens": sum(one.prompt_tokens for one in some),
            "output_tokens": sum(one.output_tokens for one in some),
            "shared": traffic.shared(work),
            "arrivals": args.arrivals,
        },
        "slo_ms": {"ttft": args.slo.ttft, "itl": args.slo.itl},
        "baseline": next(iter(next(iter(found.values())))),
        "medians": {rate: {name: medians(one.rounds) for name, one in arms.items()} for rate, arms in found.items()},
        "lost": {
            rate: {
                name: {**one.lost(), "of": len(one.outcomes), "reasons": one.reasons()} for name, one in arms.items()
            }
            for rate, arms in found.items()
        },
        "by_round": {rate: {name: one.rounds for name, one in arms.items()} for rate, arms in found.items()},
    }


def main(argv: list[str] | None = None) -> None:
    args, work = parse(argv)
    print(heading(work, args) + "\n", flush=True)
    with serving(args, timed=False) as started:
        arms = [*started, *args.running]
        found = measure(arms, work, args)
    for rate, levels in found.items():
        print(f"{rate}, arrivals: {args.arrivals}, medians of {args.rounds}\n{table(levels)}\n")
    if args.plot:
        distributions.plot(args.plot, found, args.slo, heading(work, args))
    print(json.dumps({**facts_of(found, work, args), "gpus": {arm.name: arm.gpus for arm in arms}}))


def command() -> None:
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
