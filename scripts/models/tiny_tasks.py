"""The tasks of the trained tiny model, made by code: what it learns, and what it is measured by.

A task is a conversation in the chat template of make_tiny_model.py; the model learns the assistant's turns. All of them
look for something among near-identical things in a long prompt, because that is where a rounding error of the prefill
can show; most of them then write long, step by step, because that is where an error of decode builds up.

    find    records key=value; keys differ from each other in a digit or two     482917=550812
    hops    a graph with numbered doors; a path of many doors, each hop written  3:4829.2>1730
    order   a price list; a long order, each price looked up, added or taken off with every carry written
    agent   open a page with a tool, find a reference between lines of real code, open that page, ..., answer
    quote   several versions of an excerpt of real code that differ in a word here and there; quote lines of one

Training draws every knob anew from its range in TRAINED, and prompts of any length; evaluation takes one level of
LEVELS, one length, other seeds, and lines of files that training never saw.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from scripts.models.tiny_problems import find, hops, number, order, page_maker, quote
from scripts.models.tiny_text import stdlib_files, usable_lines

# Knobs. digits: of a key; near: the share of keys that are another one with one digit changed; crowd: the share that
# are the asked one with one or two digits changed, none in training (near is of the rest then); hops, lines, pages:
# written steps; versions: copies of the excerpt. TRAINED is what training draws from, both ends included; LEVELS what
# a measurement takes, the easiest first, and the last is beyond training.
TRAINED: dict[str, dict[str, tuple[float, float]]] = {
    "find": {"digits": (4, 7), "near": (0.0, 0.95)},
    "hops": {"digits": (4, 4), "hops": (1, 32)},
    "order": {"digits": (4, 5), "lines": (1, 20)},
    "agent": {"digits": (3, 4), "pages": (1, 8)},
    "quote": {"versions": (2, 12), "lines": (1, 6)},
}
LEVELS: dict[str, tuple[dict[str, float], ...]] = {
    "find": (
        {"digits": 5, "near": 0.8},
        {"digits": 7, "near": 0.95, "crowd": 0.8},
        {"digits": 8, "near": 0.0, "crowd": 1.0},
    ),
    "hops": ({"digits": 4, "hops": 12}, {"digits": 4, "hops": 32}, {"digits": 4, "hops": 64}),
    "order": ({"digits": 4, "lines": 8}, {"digits": 5, "lines": 20}, {"digits": 5, "lines": 28}),
    "agent": ({"digits": 3, "pages": 4}, {"digits": 4, "pages": 8}, {"digits": 4, "pages": 14}),
    "quote": ({"versions": 5, "lines": 3}, {"versions": 12, "lines": 6}, {"versions": 20, "lines": 8}),
}
TASKS = tuple(LEVELS)
LEVEL = dict.fromkeys(TASKS, 1)  # the level that a measurement uses unless told otherwise
LENGTHS = (2048, 4096, 8192)  # prompt tokens, roughly; a prompt is at most this long
QUESTIONS = {"find": 24, "hops": 3, "order": 3, "agent": 1, "quote": 6}  # at most, about one prompt, in training

TOOL = {
    "name": "open",
    "description": "Open a page.",
    "parameters": {"type": "object", "properties": {"page": {"type": "string"}}, "required": ["page"]},
}
# What the chat template makes of `tools`, as a system message: what SGLang adds to a tool differs between its versions.
SYSTEM = f"""\
# Tools
Each line is one function that you may call.
<tools>
{json.dumps(TOOL)}
</tools>
To call one, write:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""
_CALL = re.compile(r'<tool_call>\s*\{"name": "open", "arguments": \{"page": "([^"]*)"\}\}\s*</tool_call>')

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One problem. ``messages`` ends with the user's; ``turns`` are the further ones of the right conversation,
    assistant's first (training learns them all); ``answer`` is the last of the first question's turns."""

    task: str
    level: int | None
    length: int
    messages: list[Message]
    answer: str
    turns: list[Message]
    page: Callable[[str, int], str] | None = field(default=None, compare=False)

    def reply(self, output: str, calls: int) -> str | None:
        """What the tool returns for the model's turn, `calls` calls having gone before; None: it called none."""
        call = _CALL.search(output)
        return self.page(call[1], calls) if call and self.page else None

    @property
    def max_calls(self) -> int:
        return sum(turn["role"] == "tool" for turn in self.turns)

    @property
    def longest(self) -> str:
        """The longest turn that the first question asks of the model: how many tokens it needs."""
        asked = self.turns if self.page else self.turns[:1]
        return max((turn["content"] for turn in asked if turn["role"] == "assistant"), key=len)


def examples(
    task: str,
    split: str,
    n: int,
    seed: int = 0,
    *,
    level: int | None = None,
    length: int = 2048,
    lines: list[str] | None = None,
) -> list[Example]:
    """`n` problems of one level (default: LEVEL) with prompts of at most `length` tokens; the same for the same
    arguments. `lines` is the real text to use (default: the Python library's, of that split)."""
    if task not in LEVELS:
        raise ValueError(f"task {task!r}: allowed are {', '.join(TASKS)}")
    level = LEVEL[task] if level is None else level
    if not 0 <= level < len(LEVELS[task]):
        raise ValueError(f"level {level} of {task}: allowed are 0 to {len(LEVELS[task]) - 1}")
    lines = default_lines(split) if lines is None else lines
    made = []
    for i in range(n):
        rng = random.Random(f"{task}/{split}/{seed}/{level}/{length}/{i}")
        made.append(_make(task, rng, LEVELS[task][level], level, length, lines, questions=1))
    return made


def training_example(task: str, rng: random.Random, length: int, lines: list[str]) -> Example:
    """A conversation of drawn difficulty, with several questions about one prompt."""
    knobs = {}
    for name, (low, high) in TRAINED[task].items():
        knobs[name] = rng.uniform(low, high) if isinstance(high, float) else rng.randint(int(low), int(high))
    return _make(task, rng, knobs, None, length, lines, rng.randint(1, QUESTIONS[task]))


def correct(task: str, output: str, answer: str) -> bool:
    """Whether the model's last turn has the right result: the quoted lines, or the last number of the text.  Real text
    has none."""
    if task in ("quote", "text"):
        return output.strip() == answer.strip()
    numbers = re.findall("[0-9]+", output)
    return bool(numbers) and numbers[-1] == re.findall("[0-9]+", answer)[-1]


def segments(example: Example, turns: bool = True) -> list[tuple[str, bool]]:
    """The conversation's text as the chat template renders it, cut into (text, learnt); without `turns` the prompt
    with the assistant's opening at its end."""
    parts: list[tuple[str, bool]] = []
    for message in [*example.messages, *(example.turns if turns else [])]:
        role, text = message["role"], message["content"]
        if role == "assistant":
            parts += [("<|im_start|>assistant\n", False), (f"{text}<|im_end|>", True), ("\n", False)]
        else:
            text = f"<tool_response>\n{text}\n</tool_response>" if role == "tool" else text
            parts.append((f"<|im_start|>{'user' if role == 'tool' else role}\n{text}<|im_end|>\n", False))
    return parts if turns else [*parts, ("<|im_start|>assistant\n", False)]


@lru_cache(maxsize=2)
def default_lines(split: str) -> list[str]:
    return usable_lines(list(stdlib_files(split).values()))


def _agent(rng: random.Random, knobs: dict[str, int], level: int | None, length: int, lines: list[str]) -> Example:
    at, ref, seed = number(rng, 4), number(rng, knobs["digits"]), number(rng, 12)
    tokens = max(60, (length - 200) // knobs["pages"] - 50)
    page = page_maker(seed, knobs, ref, tokens, lines)
    question = f"Open page {at}. On each page find ref {ref} and open the page that it names; on the last, answer it."
    turns = []
    for calls in range(knobs["pages"]):
        turns.append({"role": "assistant", "content": call(at)})
        turns.append({"role": "tool", "content": page(at, calls)})
        found = re.search(f"# ref {ref}: ([0-9]+)", turns[-1]["content"])
        assert found, "a page without its reference"
        at = found[1]
    answer = f"ref {ref}: {at}"
    turns.append({"role": "assistant", "content": answer})
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return Example("agent", level, length, messages, answer, turns, page)


def call(page: str) -> str:
    return '<tool_call>\n{"name": "open", "arguments": {"page": "' + page + '"}}\n</tool_call>'


def _make(
    task: str,
    rng: random.Random,
    knobs: dict[str, Any],
    level: int | None,
    length: int,
    lines: list[str],
    questions: int,
) -> Example:
    if task == "agent":
        return _agent(rng, knobs, level, length, lines)
    if task == "quote":
        data, asked = quote(rng, knobs, length, lines, questions)
    else:
        data, asked = {"find": find, "hops": hops, "order": order}[task](rng, knobs, length, questions)
    turns = []
    for i, (question, answer) in enumerate(asked):
        turns += [{"role": "user", "content": question if i else f"{data}\n\n{question}"}]
        turns += [{"role": "assistant", "content": answer}]
    return Example(task, level, length, turns[:1], asked[0][1], turns[1:])
