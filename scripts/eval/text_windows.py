"""eval_text on windows of documents: prompts of so many tokens, and the text that follows each."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from scripts.eval.arms import Client
from scripts.eval.report import Results
from scripts.eval.statistics import Cells, analyse
from scripts.eval.text_data import windows
from scripts.eval.text_parts import BESIDE, REFERENCE, WORST, Cell, Part, Stored, figures
from scripts.eval.text_report import plot, tables


class Windows:
    stored: type[Stored] = Part

    def __init__(self, args: argparse.Namespace, tokenizer: Any, context: int) -> None:
        self.args = args
        self.cells: list[Cell] = [(source, length) for source in args.sources for length in args.lengths]
        longest = max(args.lengths) + args.answer_tokens
        if longest > context:
            raise SystemExit(f"--lengths: {longest} tokens; the model has {context}")
        self.every = {
            (source, length): windows(source, args.data, tokenizer, args.n, length, args.answer_tokens)
            for source in args.sources
            for length in args.lengths
        }
        self.head = (
            f"{args.n} windows of each source and length ({', '.join(args.sources)}; "
            f"{', '.join(map(str, args.lengths))}), {args.answer_tokens} tokens each"
        )

    def texts(self, cell: Cell) -> list[list[list[int]]]:
        """Prompt and answer of each request."""
        return [[window.prompt, window.answer] for window in self.every[cell]]

    def measure(self, client: Client, cell: Cell, identity: dict[str, Any]) -> Part:
        args, every = self.args, self.every[cell]
        longest = max(len(window.prompt) for window in every)
        most = max(1, min(args.wave, args.kv_tokens // (longest + args.answer_tokens + 64)))
        replayed, greedy = [], []
        for at in range(0, len(every), most):
            wave = every[at : at + most]
            prompts = [window.prompt for window in wave]
            client.arm.flush()
            replayed += client.replayed(prompts, [window.answer for window in wave])
            client.arm.flush()
            greedy += client.greedy(prompts, [args.answer_tokens] * len(wave))
        ids, logprobs = ([getattr(one, what) for one in replayed] for what in ("top_ids", "top_logprobs"))
        return Part(
            identity,
            np.stack(ids).astype(np.int32),
            np.stack(logprobs).astype(np.float32),
            np.array([one.ids for one in greedy], dtype=np.int32),
        )

    def results(self, parts: dict[Cell, dict[str, Any]], arms: list[str]) -> Results:
        values: Cells = {}
        for (source, length), row in parts.items():
            values[source, int(length)] = {arm: figures(part, row[REFERENCE]) for arm, part in row.items()}
        pairs = [(arm, REFERENCE) for arm in arms if arm != REFERENCE]
        pairs += [pair for pair in BESIDE if {*pair} <= {*arms}]
        return analyse(values, pairs, (REFERENCE, WORST), self.args.seed, self.args.draws)

    def shown(self, results: Results, arms: list[str], head: str) -> str:
        if not plot(results, arms, self.args.out / "text.png", head):
            print("no picture: matplotlib is not installed", file=sys.stderr)
        return tables(results, arms)
