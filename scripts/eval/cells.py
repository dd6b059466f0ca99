"""One task on one server: conversations played greedily, sampled, and replayed along the reference.

All examples of a group go through a turn together, as one wave (arms.py); a group is what the KV pool holds and
starts with an empty cache.  So a later turn finds the KV of the earlier ones as this server made it, and replayed
tokens the KV of the prompt that the greedy answer had.  ``flushed``: the cache is emptied before every turn, so that
earlier answers are prefilled again, as a pipeline of two servers does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scripts.eval.arms import Answer, Client
from scripts.eval.statistics import agreement, divergence, drawn_probability
from scripts.models.tiny_tasks import Example, correct, segments
from scripts.models.tiny_text import END_OF_TEXT, IM_END, Tokenizer

SLACK = 32  # tokens that an answer may have beyond 1.5 times the reference
MEASURES = ("accuracy", "sampled", "kl", "first", "nll", "same", "identical", "tokens")


@dataclass(frozen=True)
class Settings:
    """What a run measures, the same for every arm."""

    samples: int
    temperature: float
    top_p: float
    answer_tokens: int  # of each reference turn that are replayed, at most
    seed: int
    kv_tokens: int
    wave: int


@dataclass(frozen=True)
class Problem:
    """An example in tokens.  ``said`` are the reference's turns with their stop token, ``heard`` what comes after each
    but the last: the tool's answer and the assistant's opening."""

    example: Example
    number: int
    prompt: list[int]
    said: list[list[int]]
    heard: list[list[int]]

    @property
    def room(self) -> int:
        """Tokens of the conversation at its end, at most."""
        return len(self.prompt) + sum(map(limit, map(len, self.said))) + sum(map(len, self.heard))


def limit(reference: int) -> int:
    return reference + reference // 2 + SLACK


def text_problems(corpus: list[int], n: int, length: int, tokens: int) -> list[Problem]:
    """`n` windows of `length` tokens of real text, evenly spaced, each answered by the `tokens` that follow it there:
    no document ends in an answer, and no token is in two of them."""
    step = (len(corpus) - length) // n
    made = []
    for number in range(n):
        at = length + number * step
        while END_OF_TEXT in corpus[at : at + tokens]:
            at += 1 + corpus[at : at + tokens].index(END_OF_TEXT)
        if at + tokens > min(length + (number + 1) * step, len(corpus)):
            raise SystemExit(f"the held-out text is too short for {n} answers of {tokens} tokens: give a smaller --n")
        example = Example("text", None, length, [], "", [])
        made.append(Problem(example, number, corpus[at - length : at], [corpus[at : at + tokens]], []))
    return made


def heard(page: str, tokenizer: Tokenizer) -> list[int]:
    """What follows the stop token of a turn that called the tool, as the chat template renders it."""
    text = f"\n<|im_start|>user\n<tool_response>\n{page}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(text)


def problems(examples: list[Example], tokenizer: Tokenizer) -> list[Problem]:
    made = []
    for number, example in enumerate(examples):
        prompt = tokenizer.encode("".join(text for text, _ in segments(example, turns=False)))
        turns = example.turns if example.page else example.turns[:1]
        said = [[*tokenizer.encode(t["content"]), IM_END] for t in turns if t["role"] == "assistant"]
        pages = [heard(t["content"], tokenizer) for t in turns if t["role"] == "tool"]
        made.append(Problem(example, number, prompt, said, pages))
    return made


@dataclass
class Talk:
    """A conversation under way; ``answers`` are the model's turns without their stop token."""

    problem: Problem
    prompt: list[int]
    answers: list[list[int]]
    seed: int = 0
    right: bool = False
    said: list[int] = field(default_factory=list)  # all turns as they came

    def take(self, answer: Answer, tokenizer: Tokenizer) -> bool:
        """Adds the model's turn and the tool's reply to the prompt; False if the conversation has ended."""
        ids = answer.ids[:-1] if answer.ids[-1] in (IM_END, END_OF_TEXT) else answer.ids
        self.answers.append(ids)
        self.said += answer.ids
        example, calls = self.problem.example, len(self.answers) - 1
        output = tokenizer.decode(ids)
        page = example.reply(output, calls) if calls < example.max_calls else None
        if page is None:
            self.right = correct(example.task, output, example.answer)
            return False
        self.prompt = [*self.prompt, *ids, IM_END, *heard(page, tokenizer)]
        return True


@dataclass(frozen=True)
class Raw:
    """What one server did with one example; ``turns`` are the replayed reference's."""

    greedy: list[int]
    right: bool
    sampled: float
    turns: list[Answer]


def _play(
    talks: list[Talk], ask: Callable[[list[Talk]], list[Answer]], client: Client, tokenizer: Tokenizer, flushed: bool
) -> None:
    lengths = [0] * len(talks)
    going = list(range(len(talks)))
    while going:
        if flushed:
            client.arm.flush()
        answers = ask([talks[i] for i in going])
        _check_cache(client, [lengths[i] for i in going], answers, flushed)
        for i in going:
            lengths[i] = len(talks[i].prompt)
        going = [i for i, answer in zip(going, answers, strict=True) if talks[i].take(answer, tokenizer)]


def _check_cache(client: Client, before: list[int], answers: list[Answer], flushed: bool) -> None:
    """What a turn found of the turn before it, whose prompt had ``before`` tokens: all of it (pages of 64 at most)."""
    for had, answer in zip(before, answers, strict=True):
        if had and not flushed and answer.cached < had - 64:
            raise client.arm.failed(f"kept {answer.cached} of {had} earlier tokens: give it more --kv-tokens")


def measure(
    client: Client, group_of: list[Problem], settings: Settings, tokenizer: Tokenizer, *, flushed: bool = False
) -> list[Raw]:
    """All problems of a cell, in groups that fit into the KV pool."""
    raw: list[Raw] = []
    for group in groups(group_of, settings):
        client.arm.flush()
        greedy = [Talk(problem, problem.prompt, []) for problem in group]
        _play(
            greedy, lambda talks: client.greedy([t.prompt for t in talks], _limits(talks)), client, tokenizer, flushed
        )
        replayed = _replay(client, group, settings, flushed)

        def draw(talks: list[Talk]) -> list[Answer]:
            seeds = [talk.seed + len(talk.answers) for talk in talks]
            return client.sampled(
                [t.prompt for t in talks], _limits(talks), seeds, settings.temperature, settings.top_p
            )

        sampled = [
            Talk(p, p.prompt, [], _seed(settings, p, number)) for p in group for number in range(_draws(settings, p))
        ]
        if sampled:
            _play(sampled, draw, client, tokenizer, flushed)
        for i, talk in enumerate(greedy):
            drawn = [one.right for one in sampled if one.problem is talk.problem]
            share = sum(drawn) / max(1, len(drawn))
            raw.append(Raw(talk.said, talk.right, share, [turns[i] for turns in replayed if turns[i] is not None]))
    return raw


def _seed(settings: Settings, problem: Problem, sample: int) -> int:
    return zlib.crc32(f"{settings.seed}/{problem.example.task}/{problem.number}/{sample}".encode())


def _draws(settings: Settings, problem: Problem) -> int:
    """Text needs none: what draws would find by the token is computed from the replayed distributions."""
    return 0 if problem.example.task == "text" else settings.samples


def _limits(talks: list[Talk]) -> list[int]:
    lengths = [len(t.problem.said[min(len(t.answers), len(t.problem.said) - 1)]) for t in talks]
    return [n if t.problem.example.task == "text" else limit(n) for t, n in zip(talks, lengths, strict=True)]


def _replay(client: Client, group: list[Problem], settings: Settings, flushed: bool) -> list[list[Any]]:
    """By turn: each problem's replayed answer, None where its conversation is over."""
    out: list[list[Any]] = []
    prompts = {i: problem.prompt for i, problem in enumerate(group)}
    before = dict.fromkeys(prompts, 0)
    for turn in range(max(len(problem.said) for problem in group)):
        going = [i for i, problem in enumerate(group) if turn < len(problem.said)]
        if flushed:
            client.arm.flush()
        said = [group[i].said[turn][: settings.answer_tokens] for i in going]
        answers = client.replayed([prompts[i] for i in going], said)
        _check_cache(client, [before[i] for i in going], answers, flushed)
        row: list[Any] = [None] * len(group)
        for i, answer in zip(going, answers, strict=True):
            row[i], before[i] = answer, len(prompts[i])
            if turn < len(group[i].heard):
                prompts[i] = [*prompts[i], *group[i].said[turn], *group[i].heard[turn]]
        out.append(row)
    return out


def groups(every: list[Problem], settings: Settings) -> list[list[Problem]]:
    """Neighbours whose conversations fit into the KV pool together."""
    made: list[list[Problem]] = [[]]
    used = 0
    for problem in every:
        own = len(problem.prompt) if len(problem.said) == 1 else 0  # samples of an agent part at its first answer
        need = own + (1 + max(1, _draws(settings, problem))) * (problem.room - own)
        if made[-1] and (used + need > settings.kv_tokens or len(made[-1]) == settings.wave):
            made.append([])
            used = 0
        made[-1].append(problem)
        used += need
    return made


def figures(raw: list[Raw], reference: list[Raw], text: Settings | None = None) -> dict[str, Any]:
    """``{measure: [by example]}`` against BF16's, and KL and NLL by turn (means over the examples that have it).

    Of ``text``, which has no right answer, accuracy is that of its single tokens, each after the true ones: the share
    that is the most probable, and the mean probability with which a draw finds it.
    """
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    by_turn: dict[str, list[list[float]]] = {"kl": [], "nll": []}
    for mine, base in zip(raw, reference, strict=True):
        kl, nll = [], []
        for turn, (answer, other) in enumerate(zip(mine.turns, base.turns, strict=True)):
            assert answer.top_ids is not None and answer.top_logprobs is not None
            assert other.top_ids is not None and other.top_logprobs is not None
            kl.append(divergence(other.top_ids, other.top_logprobs, answer.top_ids, answer.top_logprobs))
            nll.append(-answer.top_logprobs[:, -1])
            for name, values in (("kl", kl[-1]), ("nll", nll[-1])):
                if turn == len(by_turn[name]):
                    by_turn[name].append([])
                by_turn[name][turn].append(float(values.mean()))
        same = agreement(mine.greedy, base.greedy)
        right: tuple[float, float] = (mine.right, mine.sampled)
        if text:
            right = token_accuracy(mine.turns, text.temperature, text.top_p)
        row = (*right, np.concatenate(kl).mean(), kl[0][0], np.concatenate(nll).mean(), same)
        for name, value in zip(MEASURES, (*row, mine.greedy == base.greedy, len(mine.greedy)), strict=True):
            found[name].append(round(float(value), 9))
    turns = {name: [round(float(np.mean(values)), 9) for values in rows] for name, rows in by_turn.items()}
    return {**found, "by_turn": turns}


def token_accuracy(turns: list[Answer], temperature: float, top_p: float) -> tuple[float, float]:
    logprobs = np.concatenate([np.asarray(turn.top_logprobs) for turn in turns])  # the true token's own is the last
    best = (logprobs[:, -1:] > logprobs[:, :-1]).all(1)
    return float(best.mean()), float(drawn_probability(logprobs, temperature, top_p).mean())
