"""The data of a task's prompt, and questions about it with their answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

TOTAL_DIGITS = 5
Asked = list[tuple[str, str]]


def number(rng: random.Random, digits: int) -> str:
    return "".join(rng.choices("0123456789", k=digits))


def _keys(rng: random.Random, n: int, digits: int, near: float, first: Sequence[str] = ()) -> list[str]:
    """`n` different numbers in random order, `first` among them; a share `near` of the others is another one with one
    digit changed."""
    n = min(n, 10**digits // 3)
    keys = list(first) or [number(rng, digits)]
    seen = set(keys)
    while len(keys) < n:
        if rng.random() < near:
            key, at = rng.choice(keys), rng.randrange(digits)
            key = key[:at] + rng.choice("0123456789") + key[at + 1 :]
        else:
            key = number(rng, digits)
        if key not in seen:
            seen.add(key)
            keys.append(key)
    rng.shuffle(keys)
    return keys


def _crowd(rng: random.Random, n: int, digits: int) -> list[str]:
    """A number, then `n` different ones that are it with one or two digits changed."""
    centre = number(rng, digits)
    keys = {centre: None}  # in order
    while len(keys) <= n:
        key = centre
        for at in rng.sample(range(digits), rng.choice((1, 2))):
            key = key[:at] + rng.choice("0123456789") + key[at + 1 :]
        keys[key] = None
    return list(keys)


def find(rng: random.Random, knobs: dict[str, Any], length: int, questions: int) -> tuple[str, Asked]:
    digits, crowd = knobs["digits"], knobs.get("crowd", 0)
    n = max(4, (length - 40) // (digits + 8))
    first = _crowd(rng, int(crowd * (n - 1)), digits) if crowd else []
    keys = _keys(rng, n, digits, knobs["near"], first)
    records = {key: number(rng, 6) for key in keys}
    about = first[:1] or rng.sample(keys, min(questions, len(keys)))
    asked = [(f"Value of {key}?", f"{key}={records[key]}") for key in about]
    return "\n".join(f"{key}={value}" for key, value in records.items()), asked


def hops(rng: random.Random, knobs: dict[str, int], length: int, questions: int) -> tuple[str, Asked]:
    room = length - 60 - 5 * knobs["hops"]
    edges = max(6, room // (2 * knobs["digits"] + 4))
    nodes = _keys(rng, max(2, edges // 3), knobs["digits"], 0.5)
    doors = {(node, door): rng.choice(nodes) for node in nodes for door in "123"}
    lines = [f"{node}.{door}>{to}" for (node, door), to in doors.items()]
    rng.shuffle(lines)
    asked = []
    for _ in range(questions):
        at, path, steps = rng.choice(nodes), rng.choices("123", k=knobs["hops"]), []
        question = f"From {at} by " + " ".join(f"{i}:{door}" for i, door in enumerate(path, 1))
        for i, door in enumerate(path, 1):
            steps.append(f"{i}:{at}.{door}>{doors[at, door]}")
            at = doors[at, door]
        asked.append((question, "\n".join(steps)))
    return "\n".join(lines), asked


def order(rng: random.Random, knobs: dict[str, int], length: int, questions: int) -> tuple[str, Asked]:
    room = length - 60 - (5 + knobs["digits"]) * knobs["lines"]
    keys = _keys(rng, max(4, room // (knobs["digits"] + 6)), knobs["digits"], 0.5)
    prices = {key: number(rng, 4) for key in keys}
    asked = []
    for _ in range(questions):
        total, steps, lines = "0" * TOTAL_DIGITS, [], []
        for i in range(1, knobs["lines"] + 1):
            key, sign = rng.choice(keys), "+" if total < "2" or rng.random() < 0.6 else "-"
            work, total = _written(total, sign, prices[key])
            lines.append(f"{i}:{sign}{key}")
            steps.append(f"{i}:{sign}{key}={prices[key]} {work} {total}")
        asked.append(("Total of " + " ".join(lines), "\n".join(steps)))
    return "\n".join(f"{key}={price}" for key, price in prices.items()), asked


def _written(total: str, sign: str, price: str) -> tuple[str, str]:
    """Digit by digit from the right: ``7+8+1=16`` (carry 1, digit 6), ``3-5-0=18`` (borrow 1, digit 8)."""
    carry, digits, work = 0, "", []
    for a, b in zip(reversed(total), reversed(price.zfill(TOTAL_DIGITS)), strict=True):
        value = int(a) + int(b) + carry if sign == "+" else int(a) - int(b) - carry
        after = int(value > 9 or value < 0)
        work.append(f"{a}{sign}{b}{sign}{carry}={after}{value % 10}")
        carry, digits = after, str(value % 10) + digits
    return ",".join(work), digits


def quote(
    rng: random.Random, knobs: dict[str, int], length: int, lines: list[str], questions: int
) -> tuple[str, Asked]:
    count = max(2, min(knobs["versions"], (length - 60) // (30 * (knobs["lines"] + 1))))
    height = max(knobs["lines"] + 1, (length - 60) // (count * 28))
    start = rng.randrange(max(1, len(lines) - height))
    base = lines[start : start + height]
    words = sorted({word for line in base for word in re.findall("[A-Za-z]{3,}", line)}) or ["None"]
    names = _keys(rng, count, 3, 0.5)
    versions = {}
    for name in names:
        changed = [_changed(rng, line, words) if rng.random() < 0.7 else line for line in base]
        versions[name] = [f"{name}:{i:02d} {line}" for i, line in enumerate(changed)]
    asked = []
    for _ in range(questions):
        name, first = rng.choice(names), rng.randrange(len(base) - knobs["lines"] + 1)
        last = first + knobs["lines"] - 1
        answer = "\n".join(versions[name][first : last + 1])
        asked.append((f"Quote {name}:{first:02d} to {name}:{last:02d}", answer))
    return "\n\n".join("\n".join(version) for version in versions.values()), asked


def _changed(rng: random.Random, line: str, words: list[str]) -> str:
    found = list(re.finditer("[A-Za-z]{3,}", line))
    if not found:
        return line
    match = rng.choice(found)
    return line[: match.start()] + rng.choice(words) + line[match.end() :]


def page_maker(seed: str, knobs: dict[str, int], ref: str, tokens: int, lines: list[str]) -> Callable[[str, int], str]:
    """The tool: any page can be opened; what it holds depends on its number and on how many were opened before."""

    def page(name: str, calls: int) -> str:
        rng = random.Random(f"{seed}/{name}/{calls}")
        texts = max(1, tokens // 2 // 20)
        start = rng.randrange(max(1, len(lines) - texts))
        text = lines[start : start + texts]
        near = [ref[:i] + d + ref[i + 1 :] for i in range(len(ref)) for d in "0123456789" if d != ref[i]]
        count = max(3, tokens // 2 // (len(ref) + 10))
        keys = rng.sample(near, min(len(near), count // 2))
        keys = list(dict.fromkeys([*keys, *(number(rng, len(ref)) for _ in range(count - len(keys))), ref]))
        for key in keys:
            text.insert(rng.randrange(len(text) + 1), f"# ref {key}: {number(rng, 4)}")
        return f"page {name}, {calls + 1} of {knobs['pages']}\n" + "\n".join(text)

    return page
