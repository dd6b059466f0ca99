"""Many cases of ``run_model`` in one process, or in as many as it takes when some of them end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.processes import module
from tests.support.run_model import BROKEN

Result = dict[str, Any]
CPU = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(
    cases: Sequence[Mapping[str, Any]],
    folder: Path,
    env: Mapping[str, str],
    limit: float,
    runner: str = "tests.support.run_model",
    said: Callable[[int, Result], None] | None = None,
    at_once: int = 1,
) -> list[Result]:
    """Results in the order of ``cases``, of which ``said`` is told by its number when it is there.  A case that ends
    the process, or takes ``limit`` seconds (a start of the process included), has the end of the log as its error, and
    the next one gets a process of its own.  ``at_once``: processes beside each other, of which each has a share of the
    cases that follow each other, and a folder."""
    size = max(1, -(-len(cases) // at_once))
    shares = []
    for first in range(0, len(cases), size):
        place = Path(tempfile.mkdtemp(prefix=f"share-{first}-", dir=folder))
        tell = said and _numbered(said, first)
        shares.append(_Share(cases[first : first + size], place, {**os.environ, **env}, limit, runner, tell))
    if len(shares) == 1:
        return shares[0].run()
    with ThreadPoolExecutor(max(1, len(shares))) as pool:
        running = [pool.submit(share.run) for share in shares]
        try:
            return [result for each in running for result in each.result()]
        except BaseException:  # of one share, or of who waits
            for share in shares:
                share.stop()
            raise


def told(names: Sequence[Any]) -> Callable[[int, Result], None]:
    """For ``said``: a line on stderr for each result, which ``pytest -s`` shows as it comes."""
    began, done = time.monotonic(), iter(range(1, len(names) + 1))

    def say(number: int, result: Result) -> None:
        ended = " ".join(str(result.get("error") or result.get("refused") or "ran").split())[-200:]
        name, seconds = names[number], time.monotonic() - began
        sys.stderr.write(f"{next(done)} of {len(names)}, {seconds:.0f} s: {name}: {ended}\n")
        sys.stderr.flush()

    return say


def _numbered(said: Callable[[int, Result], None], first: int) -> Callable[[int, Result], None]:
    return lambda number, result: said(first + number, result)


class _Share:
    """The cases of one process, and of those that take its place."""

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        folder: Path,
        env: dict[str, str],
        limit: float,
        runner: str,
        said: Callable[[int, Result], None] | None,
    ) -> None:
        self._cases, self._folder, self._env, self._limit, self._runner = cases, folder, env, limit, runner
        self._said = said
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Ends ``run``, from another thread."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    def run(self) -> list[Result]:
        results: list[Result] = []

        def add(result: Result) -> None:
            results.append(result)
            if self._said:
                self._said(len(results) - 1, result)

        while len(results) < len(self._cases) and not self._stopped:
            log = self._folder / f"run-{len(results)}.log"
            began = len(results)
            for result in self._run_from(began, log):
                add(result)
            if len(results) < len(self._cases) and not (len(results) > began and results[-1].get("broken")):
                add({"error": f"the process ended: {log.read_text(errors='replace')[-3000:]}"})
        return results

    def _run_from(self, first: int, log: Path) -> Iterator[Result]:
        """What the process says until it ends; the last result is ``broken`` where it said that it cannot go on."""
        command = module(self._runner, json.dumps([*self._cases]), str(first))
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command, cwd=self._folder, env=self._env, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self._process = process
        if self._stopped:
            process.kill()
        assert process.stdout is not None
        lines = process.stdout
        watch = threading.Timer(self._limit, process.kill)
        watch.start()
        result: Result | None = None
        try:
            for line in lines:
                if not line.startswith("{"):
                    continue
                watch.cancel()
                watch = threading.Timer(self._limit, process.kill)
                watch.start()
                if result is not None:
                    yield result
                result = json.loads(line)
            status = process.wait()
        finally:
            watch.cancel()
            process.kill()
            process.wait()
            lines.close()
        if result is not None:
            yield result | ({"broken": True} if status == BROKEN else {})
