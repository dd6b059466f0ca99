#!/usr/bin/env python3
"""Prefill time and decode step of several servers, side by side on one GPU.

Every arm is a real SGLang server; all of them are up at once (with a bounded KV pool; but see --one-by-one) and each
round takes them in another order, so that a slow moment of the machine hits every arm.  Before each prompt the GPU
rests: an arm's place in the order was worth up to 5% without.  Prompts are random token ids, new for every request, so
that nothing is cached.  While a server is asked the others are stopped, since idle ones spin on the CPU (--idle).
Medians over the rounds:

    prefill  client: seconds until the first token of a prompt of L tokens, batch 1, HTTP included; L@P: of L new tokens
             behind P that one request of the round left in the cache, for all L (the KV pool must hold P and all L)
    pass     server: seconds of the forward passes (chunks) of that same prompt, without HTTP and scheduling; taken by
             CUDA events around the model runner, see passes.py
    decode   client: (time of 136 tokens - time of 8 tokens) / 128 after the same prompt, batch B

Arms: stock-bf16 and stock-fp8 (SGLang without mixquant), stock-again (stock-bf16 once more: what two equal servers
differ by), or the name or file of a recipe.
Prints a table; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager

from scripts.bench import turns
from scripts.bench.prompts import NewPrompts
from scripts.bench.servers import Arm, add_arguments, in_turn, machine, prepare, serving


def measure(arms: list[Arm], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians in milliseconds: ``{arm: {"prefill_8192": ..., "pass_8192": ..., "decode_b1_512": ...}}``."""
    prompt = NewPrompts(args.seed, args.vocab).of
    times: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in arms}

    def alone(arm: Arm) -> AbstractContextManager[None]:
        return turns.alone(arm, arms, args.idle)

    for round_number in range(args.rounds + 1):  # the first round warms up
        order = in_turn(arms, round_number)
        for prefix in args.prefixes:
            cached = prompt(prefix) if prefix else []
            for arm in order if cached else []:
                with alone(arm):
                    arm.generate([cached], 1)
            for length in args.lengths:
                for arm in order:
                    with alone(arm):
                        time.sleep(args.rest)
                        mark = arm.mark()
                        spent, (meta,) = arm.generate([cached + prompt(length)], 1)
                        if meta["cached_tokens"] != prefix:
                            raise SystemExit(f"{arm.name} had {meta['cached_tokens']} of {prefix} tokens in its cache")
                        passes = arm.pass_seconds(mark, length)
                    if round_number:
                        behind = f"@{prefix}" if prefix else ""
                        times[arm.name].setdefault(f"prefill_{length}{behind}", []).append(spent)
                        times[arm.name].setdefault(f"pass_{length}{behind}", []).append(passes)
        for batch in args.batches if round_number <= (args.decode_rounds or args.rounds) else ():
            prompts = [prompt(args.decode_context) for _ in range(batch)]
            for arm in order:
                with alone(arm):
                    arm.generate(prompts, 1)
                    few, many = arm.generate(prompts, 8)[0], arm.generate(prompts, 136)[0]
                if round_number:
                    key = f"decode_b{batch}_{args.decode_context}"
                    times[arm.name].setdefault(key, []).append((many - few) / 128)
    return {name: {key: 1e3 * statistics.median(v) for key, v in found.items()} for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[2048, 8192, 32768], help="prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--prefixes",
        nargs="+",
        type=int,
        default=[0],
        help="tokens that are in the cache before the prompt comes (default: %(default)s)",
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64], help="for decode (default: %(default)s)")
    parser.add_argument("--decode-context", type=int, default=512, help="tokens before decode (default: %(default)s)")
    parser.add_argument(
        "--rest", type=float, default=0.2, help="seconds without work before each prompt (default: %(default)s)"
    )
    parser.add_argument("--decode-rounds", type=int, metavar="N", help="decode in the first N rounds alone")
    add_arguments(parser, rounds=6, kv_tokens=70000)
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="one server after the other, for models of which one GPU holds no two; the arms then share no moment",
    )
    args = parser.parse_args()
    prepare(args, parser)
    results: dict[str, dict[str, float]] = {}
    for names in [[name] for name in args.arms] if args.one_by_one else [args.arms]:
        with serving(argparse.Namespace(**{**vars(args), "arms": names}), timed=True) as arms:
            results |= measure(arms, args)
    columns = [*next(iter(results.values()))]
    print(f"{'arm (ms)':<18}" + "".join(f"{column:>18}" for column in columns))
    first = results[args.arms[0]]
    for name, found in results.items():
        cells = (f"{found[c]:9.2f} ({first[c] / found[c]:.3f}x)" for c in columns)
        print(f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"servers that were not asked: {'none' if args.one_by_one else args.idle}")
    how = {"rounds": args.rounds, "one_by_one": args.one_by_one, "idle": args.idle, "baseline": args.arms[0]}
    print(json.dumps({**machine(), **how, "ms": results}))


def command() -> None:
    main()
