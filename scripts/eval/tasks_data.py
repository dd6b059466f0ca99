"""The problems of eval_tasks, as the prompts' tokens and what grades an answer.

| cell | prompt | an answer is right if |
|---|---|---|
| gsm8k, S | a problem of GSM8K, behind S worked ones | its last number, or what it boxes, is the reference |
| math500, 0 | a problem of MATH-500 | the same, as a value |
| niah_..., vt; L | RULER's look-up in a prompt of L tokens | it holds the references (their share counts) |

Prompts are those of eval_reasoning and eval_ruler, without thinking, rendered by the tokenizer's chat template.
Worked problems are the last of the file and the same for every question, so the problems that all of ``--shots`` leave
are asked in each cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.public.data import rows_of
from scripts.public.grading import math_answer, math_grader
from scripts.public.reasoning import DATASETS, examples
from scripts.public.ruler import prompts
from scripts.public.ruler_tasks import TASKS, material, score
from scripts.public.run import Example

FILES = {"gsm8k": "gsm8k-test.jsonl", "math500": "math500.jsonl"}
ESSAYS = "paul-graham-essays.txt"
LOOKUPS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "vt")
REASONING, RULER = "reasoning", "look-ups"
Cell = tuple[str, int]
Grade = Callable[[str, bool], tuple[str, float]]  # text, whether it was cut off -> what it says, its score


@dataclass(frozen=True)
class Problem:
    id: str
    prompt: list[int]
    limit: int  # tokens of an answer
    grade: Grade


def family(cell: Cell) -> str:
    return REASONING if cell[0] in FILES else RULER


class Counter:
    """What prompts of RULER are measured with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)


def cells_of(args: argparse.Namespace) -> list[Cell]:
    made: list[Cell] = []
    for task in args.tasks:
        levels = args.shots if task == "gsm8k" else [0] if task in FILES else args.lengths
        made += [(task, level) for level in levels]
    return made


def problems(cell: Cell, args: argparse.Namespace, tokenizer: Any) -> list[Problem]:
    task, level = cell
    if task not in FILES:
        asked = argparse.Namespace(max_tokens=None, data_seed=args.seed, limit=args.n, prefix=True)
        source = material(args.data / ESSAYS, None, None, None)
        made = prompts(task, level, asked, source, Counter(tokenizer))
        return [_problem(one, TASKS[task].tokens, _lookup(task, one), tokenizer) for one in made]
    data = DATASETS[task]
    fields = (data.question, "answer", data.solution)
    rows = rows_of(args.data / FILES[task], fields)
    most = max(args.shots) if task == "gsm8k" else 0
    made = examples(rows, data, level)[: len(rows) - most][: args.limit]
    return [_problem(one, args.tokens[task], _mathematics(one), tokenizer) for one in made]


def _problem(example: Example, limit: int, grade: Grade, tokenizer: Any) -> Problem:
    asked = [{"role": "user", "content": example.prompt}]
    # An answer has room for no thoughts, and a look-up's is begun for the model; templates that know none ignore it.
    opened = {"add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(asked, tokenize=False, **opened) + example.prefix
    return Problem(example.id, list(tokenizer(text, add_special_tokens=False).input_ids), limit, grade)


def _mathematics(example: Example) -> Grade:
    _, same = math_grader()

    def grade(text: str, cut_off: bool) -> tuple[str, float]:
        found = math_answer(text, cut_off=cut_off)
        return found or "", float(found is not None and same(found, example.answer))

    return grade


def _lookup(task: str, example: Example) -> Grade:
    def grade(text: str, cut_off: bool) -> tuple[str, float]:
        found, share = score(task, text, example.answer)
        return " ".join(found), share

    return grade


def missing(tasks: list[str], data: Path) -> str:
    """The first file that these tasks need and ``data`` lacks; empty where there is none."""
    names = {FILES.get(task, ESSAYS) for task in tasks}
    return next((name for name in sorted(names) if not (data / name).is_file()), "")
