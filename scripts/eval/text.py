#!/usr/bin/env python3
"""Quality of recipes on the text of any checkpoint: real servers, the same windows, paired intervals.

Arms are recipes by name, or files of recipes (stock-fp8: SGLang's own --quantization fp8, in both phases):

    bf16               the reference
    nvfp4-everywhere   W4A4 in both phases: what there is to take back
    stock-fp8          SGLang --quantization fp8; needs a GPU
    w4a16, w8a16       rounded weights in both phases, BF16 activations
    nvfp4              Mix-Quant: NVFP4 prefill, BF16 decode and last prompt token
    nvfp4-unprotected  the same with the last prompt token in NVFP4
    nvfp4-absmax       the same with block scales by the largest value, not searched
    nvfp4-fp8          attention's linears in FP8; nvfp4-fp8-down: down_proj too; fp8: all
    fp8-attention      with FP8 attention from 8192 tokens on, on Hopper
    fp8-compact, nvfp4-compact   one packed copy: answers from rounded weights

Each window (text_data.py) is a prompt and the text that follows it.  The server prefills the prompt, as it would for
anybody, and decodes along that text (processor.py forces each token), so each token's distribution is that of the arm's
own prompt KV and of its own decode.  Then, from an empty cache again, it goes on greedily for as many tokens.

    kl          from BF16's distribution, at each token: over the best --top tokens of both and the rest as one, so a
                lower bound of the divergence of the whole vocabulary
    perplexity  of the text that follows
    same        tokens before the greedy continuation first differs from BF16's
    recovered   (nvfp4-everywhere - arm) / (nvfp4-everywhere - bf16): of KL, and of the log-likelihood

Means over cells, a cell being a source at a length.  Intervals: paired bootstrap over windows (statistics.py).
Passes are low however short they are (MIXQUANT_MIN_TOKENS=1): what a recipe does, and not what it leaves alone.
NVFP4 is emulated where the GPU has no tensor cores for it; the table says so.

With --multi-turn, whole conversations of BFCL, turn by turn (text_turns.py), each arm in two ways:

    kept       the radix cache keeps each answer's KV as decode wrote it, and the next turn prefills what is new
    flushed    the cache is emptied before each turn, so that earlier answers are prefilled again in the arm's precision

Answers are the expected calls in both, forced as above, so the text is the same for all.  KL is from BF16's, kept, and
what there is to recover is what nvfp4-everywhere, kept, loses.  Intervals are over conversations, by turn and in all.

    top1       share of the answers' tokens where the arm's most probable token is BF16's
    exact      share of turns whose every token is the arm's most probable: greedy, it would make the expected calls

OUT/parts has a file for each arm and cell: the same command goes on where it was cut short, arms may be measured one by
one (--arms), and --collect makes the table of what is there, on any machine.  The same command on the same machine
gives the same table.  Writes OUT/results.json, OUT/tables.txt and, of windows, OUT/text.png; the last line of stdout is
JSON.

    scripts/eval_text --model MODEL --data DATA --out OUT --lengths 512 2048 8192 --n 60 --parallel 4
    scripts/eval_text --model MODEL --data DATA --out OUT --lengths 512 2048 8192 --n 60 --collect
    scripts/eval_text --model MODEL --data DATA --out OUT --multi-turn --n 60 --parallel 4
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.bench.servers import Arm, machine
from scripts.eval.arms import Client
from scripts.eval.measuring import ARMS, arms_of, digest_of, measured, started, stock_state
from scripts.eval.run import state_of
from scripts.eval.text_data import FILES, SOURCES, TURNS, missing
from scripts.eval.text_parts import REFERENCE, Cell, Check, Stored, file_of, measured_with, recipe_of, source_digest
from scripts.eval.text_speed import priced, redraw, unpriced
from scripts.eval.text_turns import Turns
from scripts.eval.text_windows import Windows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="folder of a BF16 checkpoint with its tokenizer")
    add("--data", type=Path, help="folder with the files of the sources (text_data.py); without: code alone")
    add("--out", type=Path, required=True, help="folder for the results")
    add("--arms", nargs="+", metavar="ARM", help="of these, or recipe files; default: all; bf16 is always there")
    add("--sources", nargs="+", choices=SOURCES, help="default: those with data")
    add("--lengths", nargs="+", type=int, help="prompt tokens (default: 512 2048 8192)")
    add("--multi-turn", action="store_true", help=f"whole conversations, kept and flushed ({', '.join(TURNS)})")
    add("--n", type=int, default=60, help="windows of each source and length, or conversations (default: %(default)s)")
    add(
        "--answer-tokens",
        type=int,
        default=128,
        help="that follow a prompt; at most (default: %(default)s)",
    )
    add("--top", type=int, default=64, help="tokens that KL compares one by one (default: %(default)s)")
    add("--wave", type=int, default=32, help="windows under way at once, at most (default: %(default)s)")
    add("--kv-tokens", type=int, default=300_000, help="KV pool of each server (default: %(default)s)")
    add("--parallel", type=int, default=1, help="servers that are up at once (default: %(default)s)")
    add("--gpus", type=int, default=1, help="that the servers are spread over (default: %(default)s)")
    add("--collect", action="store_true", help="the table of the parts in OUT, and no measurement")
    add("--redraw", action="store_true", help="the pictures of OUT/results.json again, and no measurement")
    add(
        "--price",
        nargs="+",
        default=[],
        metavar="GPU",
        help="speeds that `mixquant plan` predicts there, OUT/speed.png",
    )
    add("--seed", type=int, default=0, help="of servers and bootstrap (default: %(default)s)")
    add("--draws", type=int, default=10000, help="of the bootstrap (default: %(default)s)")
    add("--start-limit", type=float, default=400, help="seconds a server may take (default: %(default)s)")
    add("flags", nargs="*", help="after --: more flags for every server")
    args = parser.parse_args(argv)
    args.arms, args.recipes = arms_of(parser, args.arms or ARMS)
    args.out = args.out.resolve()
    if args.price and (unknown := unpriced(args.price)):
        parser.error(f"argument --price: {unknown}")
    if args.redraw:
        return args
    if args.model is None:
        parser.error("argument --model: needed for all but --redraw")
    for name, low in {"n": 1, "answer_tokens": 2, "top": 1, "wave": 1, "parallel": 1, "gpus": 1, "draws": 100}.items():
        if getattr(args, name) < low:
            parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} is less than {low}")
    if args.multi_turn and args.lengths:
        parser.error("argument --lengths: conversations are whole; leave it or --multi-turn out")
    if args.multi_turn and args.price:
        parser.error("argument --price: speeds are of prompts, not of conversations; leave it or --multi-turn out")
    args.lengths = args.lengths or [512, 2048, 8192]
    usable = TURNS if args.multi_turn else SOURCES
    if other := [source for source in args.sources or () if source not in usable]:
        parser.error(f"argument --sources: {other[0]} has no conversations of several turns; {', '.join(usable)} has")
    if not args.multi_turn and (min(args.lengths) < 2 or args.kv_tokens < max(args.lengths) + args.answer_tokens + 64):
        parser.error("arguments --lengths, --kv-tokens: a prompt and its answer must fit into the KV pool")
    if not (args.model / "config.json").is_file():
        parser.error(f"argument --model: {args.model} has no config.json; name the folder of a checkpoint")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"argument --data: {args.data} is no folder")
    if not args.sources:
        args.sources = [*TURNS] if args.multi_turn else there(parser, args.data)
    for one in args.sources:
        if lacking := missing(one, args.data):
            parser.error(f"argument --data: {args.data or 'nothing'} has no {lacking}, which {one} needs")
    return args


def there(parser: argparse.ArgumentParser, data: Path | None) -> list[str]:
    """The sources that have their files; stderr names the others."""
    lacking = {source: name for source in SOURCES if (name := missing(source, data))}
    if data is not None and all(source in lacking for source in SOURCES if FILES[source]):
        parser.error(
            f"argument --data: {data} has the files of no source: it lacks {', '.join(lacking.values())}; leave it out "
            "to measure code alone"
        )
    if lacking:
        why = ", ".join(f"{source} ({data or 'no --data'}: {name})" for source, name in lacking.items())
        print(f"sources that are left out, for want of a file: {why}", file=sys.stderr)
    return [source for source in SOURCES if source not in lacking]


def spare_token(vocab: int, answers: Iterable[list[int]]) -> int:
    """The last token that no answer holds: what Replay takes the place of."""
    used = {token for answer in answers for token in answer}
    return next(token for token in range(vocab - 1, -1, -1) if token not in used)


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # that whole sources are longer than the model's context
        self.args, self.check = args, Check(args.collect)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model).get_text_config()
        self.asked = (Turns if args.multi_turn else Windows)(args, tokenizer, config.max_position_embeddings)
        self.cells = self.asked.cells
        self.digests = {
            cell: hashlib.sha256(json.dumps(self.asked.texts(cell)).encode()).hexdigest()[:16] for cell in self.cells
        }
        answers = (answer for cell in self.cells for _, answer in self.asked.texts(cell))
        self.spare = spare_token(config.vocab_size, answers)
        where = machine()
        self.identity = {
            **{name: where[name] for name in ("sglang", "torch")},
            "gpu": " and ".join(sorted({*where["gpu"].splitlines()})),
            "model": digest_of(args.model),
            "source": source_digest(),
            **{name: getattr(args, name) for name in ("top", "wave", "kv_tokens", "seed", "flags")},
            "spare": self.spare,
        }
        (args.out / "parts").mkdir(parents=True, exist_ok=True)

    def identity_of(self, cell: Cell, arm: str) -> dict[str, Any]:
        own = {"cell": [*cell], "text": self.digests[cell], "recipe": recipe_of(arm, self.args.recipes)}
        return self.identity | own

    def stored(self, cell: Cell, arm: str) -> Stored | None:
        file = file_of(self.args.out, cell, arm)
        if not file.is_file():
            return None
        part = self.asked.stored.load(file)
        expected = self.identity_of(cell, arm)
        base = file_of(self.args.out, cell, REFERENCE)
        known = self.asked.stored.load(base).identity if self.args.collect and base.is_file() else expected
        self.check(file, arm, part.identity, expected, known)
        return part

    def measure(self, arm: Arm, name: str) -> None:
        client = Client(arm, self.args.top, self.spare, ())
        server = state_of(arm) if not name.startswith("stock-") else stock_state(arm)
        for cell in self.cells:
            if self.stored(cell, name) is not None:
                continue
            began = time.monotonic()
            self.asked.measure(client, cell, self.identity_of(cell, name) | {"server": server}).save(
                file_of(self.args.out, cell, name)
            )
            print(f"{name}: {cell[0]} {cell[1]}, {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    def waiting(self) -> list[str]:
        return [arm for arm in self.args.arms if any(self.stored(cell, arm) is None for cell in self.cells)]

    def report(self, arms: list[str]) -> dict[str, Any]:
        args = self.args
        parts: dict[Cell, dict[str, Any]] = {}
        for cell in self.cells:
            parts[cell] = {arm: part for arm in arms if (part := self.stored(cell, arm)) is not None}
        results = self.asked.results(parts, arms)
        row = parts[self.cells[0]]
        servers = {arm: part.identity["server"] for arm, part in row.items()}
        made = measured_with(part.identity for every in parts.values() for part in every.values())
        said = {name: " and ".join(every) for name, every in made.items()}
        known = row[REFERENCE].identity
        head = (
            f"{args.model.name} ({known['model']}): {self.asked.head}, top {args.top}; GPU {said['gpu']}, SGLang "
            f"{said['sglang']}, torch {said['torch']}, mixquant {said['mixquant'] or 'none'}; emulated: "
            f"{', '.join(made['emulated']) or 'nothing'}"
        )
        text = f"{head}\n\n{self.asked.shown(results, arms, head)}\n"
        if speed := priced(args, results, arms, head):
            text += f"\n{speed}"
        full = {
            "head": head,
            "recipes": {arm: part.identity["recipe"] for arm, part in row.items()},
            "identity": {**known, "cell": None},
            "measured_with": made,
            "servers": servers,
            "arms": arms,
            "results": results,
        }
        (args.out / "results.json").write_text(json.dumps(full) + "\n")
        (args.out / "tables.txt").write_text(text)
        print(text)
        return {"out": str(args.out), "arms": arms, "emulated": made["emulated"], "all": results["all"]}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.redraw:
        redraw(args)
        return
    run = Run(args)
    arms = measured(run)
    print(json.dumps(run.report(arms)))


def command() -> None:
    started(main)
