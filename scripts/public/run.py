"""A run of a public benchmark: examples, their records on disk, the requests under way.

A file of records is JSONL.  Its first line holds the identity of the run: all that decides the answers, the server
included.  Every other line is one sample of one example::

    {"id", "seed", "prompt": hash of the prompt, "output", "finish", "prompt_tokens", "output_tokens", "extracted",
     "answer", "correct", "score", "groups"}

It is written when its answer is there.  The same command goes on after the last whole line; one that was cut short is
dropped.  Another identity, or another prompt under the same id, ends the run in one line.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from scripts.public.server import Stop

Record = dict[str, Any]
Key = tuple[str, int]


@dataclass(frozen=True)
class Example:
    id: str
    prompt: str
    answer: Any
    groups: tuple[str, ...] = ()
    prefix: str = ""  # how the answer begins

    @property
    def hash(self) -> str:
        return hashlib.sha256(f"{self.prompt}\0{self.prefix}".encode()).hexdigest()[:16]


Work = Callable[[Example, int], Awaitable[Record]]


class Records:
    """One file.  ``identity`` None: whatever the file has, which must be there."""

    def __init__(self, file: Path, identity: dict[str, Any] | None) -> None:
        self.file = file
        try:
            data = file.read_bytes() if file.is_file() else b""
        except OSError as error:
            raise Stop(f"{file}: {error.strerror}") from None
        self.whole = data.rfind(b"\n") + 1
        header, self.by_key = _parse(file, data[: self.whole])
        if header is None and identity is None:
            raise Stop(f"{file}: no such records; generate them first")
        self.identity: dict[str, Any] = (header if identity is None else identity) or {}
        if header is not None and identity is not None:
            plain = json.loads(json.dumps(identity))  # tuples and the like, as the file has them
            for name in [*plain, *header]:
                if header.get(name) != plain.get(name):
                    other = f"{json.dumps(header.get(name))}, not {json.dumps(plain.get(name))}"
                    raise Stop(f"{file} was made with {name} {other}: name another --out, or remove the file")
        self.new = header is None

    def matching(self, examples: list[Example], seeds: list[int]) -> dict[Key, Record]:
        """The records of these samples that are there."""
        found = {}
        for example in examples:
            for seed in seeds:
                record = self.by_key.get((example.id, seed))
                if record is None:
                    continue
                if record["prompt"] != example.hash:
                    raise Stop(f"{self.file}: example {example.id} had another prompt: name another --out")
                found[example.id, seed] = record
        return found

    def __enter__(self) -> Records:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.truncate(self.whole)
            self.out = self.file.open("a", encoding="utf-8")
        except OSError as error:
            raise Stop(f"{self.file}: {error.strerror}") from None
        if self.new:
            self._line({"identity": self.identity})
        return self

    def __exit__(self, *_: object) -> None:
        self.out.close()

    def _line(self, record: Record) -> None:
        self.out.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.out.flush()

    def add(self, record: Record) -> None:
        self._line(record)
        self.by_key[record["id"], record["seed"]] = record


def _parse(file: Path, data: bytes) -> tuple[dict[str, Any] | None, dict[Key, Record]]:
    header, records = None, {}
    for place, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if place == 1:
                header = dict(record["identity"])
            else:
                records[str(record["id"]), int(record["seed"])] = {"prompt": record["prompt"], **record}
        except (ValueError, KeyError, TypeError):
            raise Stop(f"{file}:{place}: not a record of this benchmark; name another --out") from None
    return header, records


async def run(
    name: str, examples: list[Example], seeds: list[int], records: Records, work: Work, concurrency: int
) -> list[Record]:
    """Asks for what is missing; all records of these samples."""
    if len({example.id for example in examples}) < len(examples):
        raise Stop(f"{name}: two examples have the same id")
    done = records.matching(examples, seeds)
    every = [(example, seed) for seed in seeds for example in examples]
    waiting = iter([(example, seed) for example, seed in every if (example.id, seed) not in done])
    with records, tqdm(total=len(every), initial=len(done), desc=name, file=sys.stderr, leave=False) as bar:

        async def worker() -> None:
            for example, seed in waiting:
                made = await work(example, seed)
                head = {"id": example.id, "seed": seed, "prompt": example.hash}
                records.add({**head, **made, "answer": example.answer, "groups": list(example.groups)})
                bar.update()

        workers = [asyncio.create_task(worker()) for _ in range(min(concurrency, len(every) - len(done)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return [records.by_key[example.id, seed] for example, seed in every]


def start(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> None:
    """``main`` with every expected failure as one line and an exit status."""
    try:
        asyncio.run(main(argv))
    except Stop as stop:
        sys.exit(f"{Path(sys.argv[0]).stem}: {stop}")
    except KeyboardInterrupt:
        sys.exit(130)
