#!/usr/bin/env python3
"""Quality of several recipes on one model: real servers, the same prompts, paired differences with intervals.

Arms, each a recipe (prefill / decode / last prompt token):

    bf16             bf16  / bf16  / bf16    the reference
    everywhere       nvfp4 / nvfp4 / nvfp4   W4A4 in both phases
    mix              nvfp4 / bf16  / bf16    Mix-Quant, the recipe nvfp4
    mix-unprotected  nvfp4 / bf16  / nvfp4   the same without the BF16 last token
    decode-only      bf16  / nvfp4 / bf16    the other half of `everywhere`
    mix-fp8          fp8   / bf16  / bf16    the recipe fp8
    attention-fp8    nvfp4, in attention fp8 / bf16 / bf16: the recipe nvfp4-fp8

Measures by example: right or not, greedily and as the mean of samples (--temperature, --top-p); KL from BF16 and
negative log-likelihood at each token of the reference answer, given the KV that the arm made of the prompt
(processor.py); tokens until the greedy answer first differs from BF16's, whether it ever does, and its length.
An agent's conversation counts as one example.  The task ``text`` goes on with real, held-out code: there the
probabilities are spread as in a large model, and accuracy is that of single tokens.  Intervals: paired bootstrap
(statistics.py).

--ablation: the recipe nvfp4 with one choice changed in each arm (arms.py).

--multi-turn: the agent task alone.  Each arm twice: ``kept``, where the radix cache holds earlier answers as
decode made them, and ``flushed`` before every turn, where they are prefilled again, as by a pipeline of two servers.

Problems are held-out ones of tiny_tasks.py, at their default level; seeds are fixed, samples draw by their own seeds,
and requests travel in batches that do not depend on time: the same command on the same machine gives the same table.
(FP8 on a GPU times its GEMMs at the first start and keeps the choice in ~/.cache/mixquant, which belongs to the machine
then.)  NVFP4 is emulated where the GPU has no tensor cores for it; the table says so.

Writes OUT/cells/*.json (an arm's finished cells are not measured again: the same command goes on where it was cut
short), OUT/results.json, OUT/tables.txt, OUT/accuracy.png, and with --ablation OUT/tradeoff.png.  The last line of
stdout is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.bench.servers import serving
from scripts.eval.arms import ABLATIONS, FLAGS, MAIN, RECIPES, write_recipes
from scripts.eval.run import TEXT, Cell, Run, processor_on_path
from scripts.eval.statistics import REFERENCE
from scripts.models.tiny_tasks import LENGTHS, LEVEL, LEVELS, TASKS
from scripts.models.tiny_text import SPECIAL, Tokenizer


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Cell]]:
    """The arguments and what to measure; whatever is wrong ends in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint with a tokenizer of train_tiny_model or make_tiny_model")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--data", type=Path, help="what train_tiny_model --prepare wrote (default: this Python's own held-out sources)")
    add("--multi-turn", action="store_true", help="earlier answers kept or prefilled again, over long agent loops")
    add("--ablation", action="store_true", help="what each choice of the recipe nvfp4 buys; no samples")
    add("--report", action="store_true", help="the report of a run in OUT, on whatever machine, and no measurement")
    add("--arms", nargs="+", choices=[*RECIPES, *ABLATIONS], metavar="ARM", help="default: all of the mode's")
    add("--tasks", nargs="+", choices=(*TASKS, TEXT), metavar="TASK", help="default: all")
    add("--lengths", nargs="+", type=int, default=list(LENGTHS), help="prompt tokens (default: %(default)s)")
    add("--level", type=int, choices=range(3), help="of every task (default: 1)")
    add("--n", type=int, default=170, help="examples of each task and length (default: %(default)s)")
    add("--samples", type=int, help="of each example (default: 4; 0 with --ablation)")
    add("--temperature", type=float, default=0.6)
    add("--top-p", type=float, default=0.95)
    add("--top", type=int, default=20, help="tokens that KL compares one by one (default: %(default)s)")
    add("--answer-tokens", type=int, default=256, help="of a reference turn that KL and NLL look at, at most")
    add("--seed", type=int, default=0, help="of problems, samples and bootstrap (default: %(default)s)")
    add("--draws", type=int, default=10000, help="of the bootstrap (default: %(default)s)")
    add("--kv-tokens", type=int, default=6_000_000, help="KV pool of each server (default: %(default)s)")
    add("--wave", type=int, default=510, help="examples under way at once, at most (default: %(default)s)")
    add("--at-once", type=int, default=len(MAIN), help="servers that are up at once (default: %(default)s)")
    add("--gpus", type=int, default=1, help="that the servers are spread over (default: %(default)s)")
    add("--start-limit", type=float, default=400, help="seconds a server may take (default: %(default)s)")
    add("flags", nargs="*", help="after --: more flags for every server")
    args = parser.parse_args(argv)
    args.tasks = args.tasks or (["agent"] if args.multi_turn else [*TASKS, TEXT])
    arms = args.arms or (["everywhere", "mix", "mix-unprotected", *ABLATIONS] if args.ablation else list(MAIN))
    args.arms = list(dict.fromkeys([REFERENCE, *arms]))  # it is what all are compared with
    if args.samples is None:
        args.samples = 0 if args.ablation else 4
    least = {"n": 1, "samples": 0, "top": 1, "answer_tokens": 1, "draws": 100, "at_once": 1, "gpus": 1, "wave": 1}
    least |= {"seed": 0}
    for name, low in least.items():
        if getattr(args, name) < low:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is less than {low}")
    if not (args.temperature > 0 and 0 < args.top_p <= 1):
        parser.error("arguments --temperature, --top-p: above 0, and --top-p at most 1")
    if args.multi_turn and args.tasks != ["agent"]:
        parser.error("argument --multi-turn: only the task agent has several turns; leave --tasks out")
    if args.multi_turn and args.ablation:
        parser.error("argument --ablation: not together with --multi-turn; name the --arms there")
    if not (args.model / "config.json").is_file():
        parser.error(f"argument --model: {args.model} has no config.json; name a folder of train_tiny_model")
    config = json.loads((args.model / "config.json").read_text())
    args.context, args.layers = config["max_position_embeddings"], config["num_hidden_layers"]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        args.tokenizer = Tokenizer(args.model / "tokenizer.json")
        ids = json.loads((args.model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        missing = [t for i, t in enumerate(SPECIAL) if ids.get(t) != i] + [d for d in "0123456789" if d not in ids]
        if missing:
            parser.error(f"argument --model: the tokenizer has no {missing[0]!r} in its place; use a tiny model's")
    if not hasattr(args, "tokenizer"):
        parser.error(f"argument --model: {args.model}/tokenizer.json cannot be read as a byte-level BPE")
    for name in ("eval.txt.gz", "eval.npz") if args.data else ():
        if not (args.data / name).is_file():
            parser.error(f"argument --data: {args.data} has no {name}; name what train_tiny_model --prepare wrote")
    levels = {**LEVEL, TEXT: 0}
    level = {task: levels[task] if args.level is None or task == TEXT else args.level for task in args.tasks}
    assert all(level[task] < len(LEVELS[task]) for task in args.tasks if task != TEXT)
    return args, [Cell(task, level[task], length) for task in args.tasks for length in args.lengths]


def main(argv: list[str] | None = None) -> None:
    args, cells = parse(argv)
    args.out = args.out.resolve()
    run = Run(args, cells)
    waiting = run.waiting()
    if waiting and args.report:
        raise SystemExit(f"{args.out}: {waiting[0].task} at {waiting[0].length} is not measured for every arm")
    if waiting:
        args.dummy, args.model_path, args.logs = False, args.model.resolve(), args.out / "logs"
        files = write_recipes(args.logs, args.arms, args.layers)
        args.flags = [*FLAGS, "--random-seed", str(args.seed), *args.flags]
        for at in range(0, len(files), args.at_once):
            group = argparse.Namespace(**{**vars(args), "arms": files[at : at + args.at_once]})
            # The pool outside: whatever ends this, servers are stopped first, and requests to them fail.
            with ThreadPoolExecutor(len(group.arms)) as pool, processor_on_path(), serving(group, timed=False) as arms:
                run.measure(pool, arms, waiting)
    print(json.dumps(run.report()))


def command() -> None:
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
