"""Prompts of RULER (arXiv 2404.06654), made by code: needles, variable tracking, common and frequent words, QA.

The 13 tasks with their published parameters and wording (github.com/NVIDIA/RULER, Apache-2.0, scripts/synthetic.yaml,
scripts/data/synthetic); the code is our own, so the prompts are of the same kind as the published ones, not the same
ones.  Essays and word lists are not ours to ship: without a file of essays the haystack of the `essay` tasks is RULER's
noise; words that no file gives are made of syllables.  QA needs a file of SQuAD or HotpotQA.

A task makes ``(question, how the answer begins, references)`` from a size, which is what grows with the length: lines
of a haystack, words of an essay, words of a list, documents.
"""

from __future__ import annotations

import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from scripts.public.data import read_json
from scripts.public.server import Stop

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {} for {} is: {}."
HIDDEN = (
    "{0} special magic {1} {2} hidden within the following text. Make sure to memorize it. I will quiz you about the "
)
HIDDEN += "{1} afterwards.\n{3}\nWhat {4} the special magic {1} for {5} mentioned in the provided text?"
TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}\nQuestion: Find all "
)
TRACK += "variables that are assigned the value {} in the text above."
TRACKED = (
    "Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the value "
)
TRACKED += "{}, they are: "
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
)
COMMON += "appear most often.\n{}\nQuestion: What are the 10 most common words in the above list?"
COMMON_ANSWER = "Answer: The top 10 words that appear most often in the list are:"
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
)
CODED += (
    "coded words. {}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
)
CODED += "frequently appeared words in the above coded text?"
CODED_ANSWER = "Answer: According to the coded text above, the three most frequently appeared words are:"
ONLY = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
DOCUMENTS = ONLY + "The following are given documents.\n\n{}\n\n" + ONLY + "Question: {}"

Made = tuple[str, str, list[str]]


@dataclass(frozen=True)
class Questions:
    """QA over documents: (question, answers, places of its own documents)."""

    documents: list[str] = field(default_factory=list)
    asked: list[tuple[str, list[str], list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class Material:
    """What the prompts are made of, beside chance."""

    essay: list[str] = field(default_factory=list)  # words
    words: list[str] = field(default_factory=list)
    questions: dict[str, Questions] = field(default_factory=dict)


def syllable_words(count: int) -> list[str]:
    """Words of three syllables, in an order that is always the same."""
    syllables = [a + b for a in "bdfghjklmnprstvwz" for b in "aeiou"]
    rng = Random(0)
    made = dict.fromkeys("".join(rng.choices(syllables, k=3)) for _ in range(2 * count))
    return list(made)[:count]


def material(essays: Path | None, words: Path | None, squad: Path | None, hotpotqa: Path | None) -> Material:
    for file in (essays, words):
        if file and not file.is_file():
            raise Stop(f"{file}: no such file")
    text = essays.read_text(encoding="utf-8").split() if essays else []
    every = list(dict.fromkeys(words.read_text(encoding="utf-8").split())) if words else syllable_words(20_000)
    if words and len(every) < 100:
        raise Stop(f"{words}: {len(every)} different words; give 100 at least")
    questions = {}
    try:
        if squad:
            questions["qa_1"] = _squad(read_json(squad))
        if hotpotqa:
            questions["qa_2"] = _hotpotqa(read_json(hotpotqa))
    except (KeyError, TypeError, ValueError) as error:
        file = hotpotqa if "qa_1" in questions or not squad else squad
        raise Stop(f"{file}: not the layout of SQuAD 2.0's or HotpotQA's own JSON ({error!r})") from None
    return Material(text, every, questions)


def _squad(data: Any) -> Questions:
    paragraphs = [paragraph for article in data["data"] for paragraph in article["paragraphs"]]
    documents = list(dict.fromkeys(paragraph["context"] for paragraph in paragraphs))
    place = {text: at for at, text in enumerate(documents)}
    asked = [
        (one["question"], [answer["text"] for answer in one["answers"]], [place[paragraph["context"]]])
        for paragraph in paragraphs
        for one in paragraph["qas"]
        if one["answers"] and not one.get("is_impossible")
    ]
    return Questions(documents, asked)


def _hotpotqa(data: Any) -> Questions:
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]] for one in data]
    documents = list(dict.fromkeys(text for group in texts for text in group))
    place = {text: at for at, text in enumerate(documents)}
    asked = [
        (one["question"], [one["answer"]], [place[text] for text in group])
        for one, group in zip(data, texts, strict=True)
    ]
    return Questions(documents, asked)


def _name(kind: str, rng: Random, source: Material) -> str:
    """A word, a number of seven digits or a UUID."""
    if kind == "words":
        return "-".join(rng.sample(source.words, 2))
    return str(rng.randrange(10**6, 10**7) if kind == "numbers" else uuid.UUID(int=rng.getrandbits(128), version=4))


def niah(
    size: int, rng: Random, source: Material, *, haystack: str, k: int = 1, v: int = 1, q: int = 1, kinds: str = "wn"
) -> Made:
    """``k`` keys with ``v`` values each, ``q`` of them asked for."""
    of_keys, of_values = ({"w": "words", "n": "numbers", "u": "uuids"}[letter] for letter in kinds)
    keys: dict[str, list[str]] = {}
    while len(keys) < max(k, q):
        keys[_name(of_keys, rng, source)] = [_name(of_values, rng, source) for _ in range(v)]
    needles = [NEEDLE.format(of_values, key, value) for key, values in keys.items() for value in values]
    rng.shuffle(needles)
    if haystack == "essay" and source.essay:
        repeats = -(-size // len(source.essay))
        lines, joint = re.split(r"(?<=[.!?])\s+", " ".join((source.essay * repeats)[:size])), " "
    elif haystack == "needle":
        others = ((_name(of_keys, rng, source), _name(of_values, rng, source)) for _ in range(size))
        lines, joint = [NEEDLE.format(of_values, key, value) for key, value in others], "\n"
    else:
        lines, joint = [NOISE] * size, "\n"
    places = sorted(rng.choices(range(len(lines) + 1), k=len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle)
    asked = rng.sample(list(keys), q)
    answers = [value for key in asked for value in keys[key]]
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if q > 1 else asked[0]
    one = len(answers) == 1
    some, are, noun = ("A", "is", of_values[:-1]) if one else ("Some", "are", of_values)
    question = HIDDEN.format(some, noun, are, joint.join(lines), "is" if one else "are all", query)
    return question, f"The special magic {noun} for {query} mentioned in the provided text {are}", answers


def _chain(size: int, rng: Random, letters: int, hops: int = 4) -> Made:
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [] if name in names else [name]
    value = str(rng.randrange(10_000, 100_000))
    steps = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
    lines = [NOISE] * size
    for nth, (place, step) in enumerate(zip(sorted(rng.choices(range(size + 1), k=hops + 1)), steps, strict=True)):
        lines.insert(place + nth, step)
    return TRACK.format("\n".join(lines), value), TRACKED.format(hops + 1, value), names


def variable_tracking(size: int, rng: Random, source: Material) -> Made:
    """A worked short example, then the chain to follow."""
    shown, beginning, names = _chain(5, rng, letters=3)
    question, prefix, answers = _chain(size, rng, letters=5)
    return f"{shown} {beginning}{' '.join(names)}\n\n{question}", prefix, answers


def _listed(size: int, rng: Random, source: Material, often: int, seldom: int) -> tuple[str, list[str]]:
    words = rng.sample(source.words if size <= len(source.words) else syllable_words(size), size)
    common, others = words[:10], words[10:]
    every = common * often + others * seldom
    rng.shuffle(every)
    return _numbered(every), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def common_words(size: int, rng: Random, source: Material, *, short: bool = False) -> Made:
    """Ten words 30 times each among words 3 times each (6 among 1 in prompts below 4096 tokens), after an example."""
    shown, answer = _listed(20, rng, source, 3, 1) if short else _listed(40, rng, source, 10, 3)
    listed, common = _listed(size, rng, source, *((6, 1) if short else (30, 3)))
    example = f"{COMMON.format(shown)} {COMMON_ANSWER} {_numbered(answer)}"
    return f"{example}\n{COMMON.format(listed)}", COMMON_ANSWER, common


def frequent_words(size: int, rng: Random, source: Material, *, length: int) -> Made:
    """Made-up words whose counts fall as rank ** -2; the most frequent one is written as dots and does not count."""
    vocabulary = dict.fromkeys("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(max(length // 50, 8)))
    zeta2 = 1.6449340668482264
    words: list[str] = []
    for rank, word in enumerate(vocabulary, 1):
        words += ["..." if rank == 1 else word] * int(size * rank**-2 / zeta2)
    rng.shuffle(words)
    return CODED.format(" ".join(words)), CODED_ANSWER, list(vocabulary)[1:4]


def qa(size: int, rng: Random, source: Material, *, name: str, nth: int = 0) -> Made:
    """A question over ``size`` documents, its own among them."""
    found = source.questions[name]
    question, answers, own = found.asked[nth % len(found.asked)]
    others = [at for at in range(len(found.documents)) if at not in own]
    more = max(0, size - len(own))
    places = own + (rng.sample(others, more) if more <= len(others) else rng.choices(others or own, k=more))
    rng.shuffle(places)
    documents = "\n\n".join(f"Document {n}:\n{found.documents[at]}" for n, at in enumerate(places, 1))
    return DOCUMENTS.format(documents, question), "Answer:", answers


@dataclass(frozen=True)
class Task:
    make: Callable[..., Made]
    tokens: int  # of the answer
    least: int = 1  # smallest size
    any: bool = False  # one reference is enough; otherwise the share that the answer holds


NEEDLES: dict[str, dict[str, Any]] = {
    "niah_single_1": {"haystack": "noise"},
    "niah_single_2": {"haystack": "essay"},
    "niah_single_3": {"haystack": "essay", "kinds": "wu"},
    "niah_multikey_1": {"haystack": "essay", "k": 4},
    "niah_multikey_2": {"haystack": "needle"},
    "niah_multikey_3": {"haystack": "needle", "kinds": "uu"},
    "niah_multivalue": {"haystack": "essay", "v": 4},
    "niah_multiquery": {"haystack": "essay", "q": 4},
}
TASKS = {
    **{name: Task(partial(niah, **parameters), 128) for name, parameters in NEEDLES.items()},
    "vt": Task(variable_tracking, 30),
    "cwe": Task(common_words, 120, least=20),
    "fwe": Task(frequent_words, 50, least=60),
    "qa_1": Task(partial(qa, name="qa_1"), 32, any=True),
    "qa_2": Task(partial(qa, name="qa_2"), 32, any=True),
}


def make(name: str, size: int, length: int, nth: int, seed: int, source: Material) -> Made:
    """Example ``nth`` of a task; the same arguments make the same prompt."""
    parameters: dict[str, dict[str, Any]] = {"cwe": {"short": length < 4096}, "fwe": {"length": length}}
    more = {"nth": nth} if name.startswith("qa") else parameters.get(name, {})
    return TASKS[name].make(size, Random(f"{seed} {name} {length} {nth}"), source, **more)


def fit(most: int, least: int, count: Callable[[int], int]) -> int | None:
    """The largest size from ``least`` on whose ``count`` of tokens is at most ``most``; None where there is none."""
    if count(least) > most:
        return None
    low, high = least, 2 * least
    while count(high) <= most:
        low, high = high, 2 * high
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= most else (low, middle)
    return low


def score(name: str, text: str, references: list[str]) -> tuple[list[str], float]:
    """The references that the answer holds, and their share (QA: whether there is one)."""
    found = [reference for reference in references if reference.lower() in text.lower()]
    return found, float(bool(found)) if TASKS[name].any else len(found) / len(references)
