"""What agents ask, and the one right answer.

An agent has records of its own, ``key=value`` line by line.  The keys are those of all agents, in the same order, and
no value occurs twice: prompts differ in nothing but the values, so that an answer that took keys and values of another
prompt has that agent's value, and says whose it is.  It also has a walk, a graph of numbered doors and a path of
twelve, each hop written: an answer of some 170 tokens, which gives aborts and retractions something to cut.

Why an answer may be held against the right one to the letter, whatever ran beside it: logits do move with the company
that a row has (libraries sum in another order for another number of rows), with what is cached, and with the precision
of the prefill.  So each question is asked beforehand, alone, and only those are kept that are answered right with a
``MARGIN`` between the first and the second token at every place.  That is far more than any of the three moves (some
tenths at most, ``tests/e2e/test_servers.py`` measures them), and far less than what a wrong page of the cache, a row of
another request or a broken copy of the weights does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from scripts.models.tiny_problems import hops, number

MARGIN = 2.0  # nats
KEYS, KEY_DIGITS, VALUE_DIGITS = 24, 5, 6
HOPS, WALK_LENGTH = 12, 500
FIND_TOKENS, WALK_TOKENS = 24, 260  # of an answer, at most


@dataclass(frozen=True)
class Question:
    """``agent``: whose; ``tokens``: that the answer takes, at most."""

    agent: int
    text: str
    right: str
    tokens: int


@dataclass(frozen=True)
class Agent:
    number: int
    records: str
    asks: tuple[Question, ...]
    walk: Question


def draw(seed: int, n: int, keys_asked: int) -> list[Agent]:
    """``n`` agents; the same for the same arguments."""
    rng = random.Random(f"agents {seed}")
    keys: dict[str, None] = {}
    while len(keys) < KEYS:
        keys[number(rng, KEY_DIGITS)] = None
    values: set[str] = set()
    agents = []
    for i in range(n):
        records = {}
        for key in keys:
            value = number(rng, VALUE_DIGITS)
            while value in values:
                value = number(rng, VALUE_DIGITS)
            values.add(value)
            records[key] = value
        asked = rng.sample(list(keys), keys_asked)
        asks = tuple(Question(i, f"Value of {key}?", f"{key}={records[key]}", FIND_TOKENS) for key in asked)
        graph, walks = hops(rng, {"digits": 4, "hops": HOPS}, WALK_LENGTH, 1)
        walk = Question(i, f"{graph}\n\n{walks[0][0]}", walks[0][1], WALK_TOKENS)
        agents.append(Agent(i, "\n".join(f"{key}={value}" for key, value in records.items()), asks, walk))
    return agents


def first(agent: Agent, question: Question) -> str:
    """What a conversation about an agent's records begins with."""
    return question.text if question is agent.walk else f"{agent.records}\n\n{question.text}"


def owner(agents: list[Agent], text: str) -> str:
    """Whose value a wrong answer has, for the message."""
    value = text.partition("=")[2].strip()
    found = [agent.number for agent in agents if len(value) == VALUE_DIGITS and f"={value}" in agent.records]
    return f", the value of agent {found[0]}" if found else ""


def prompt(turns: list[tuple[str, str]], question: str) -> str:
    """The chat template, for endpoints that take text; ``turns`` are (question, answer)."""
    said = "".join(f"{user(text)}{answer}<|im_end|>\n" for text, answer in turns)
    return said + user(question)


def user(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
