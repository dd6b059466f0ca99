"""Many cases of ``run_model`` in one process, or in as many as it takes when some of them end it."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
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
) -> list[Result]:
    """Results in the order of ``cases``.  A case that ends the process, or takes ``limit`` seconds (a start of the
    process included), has the end of the log as its error, and the next one gets a process of its own."""
    results: list[Result] = []
    while len(results) < len(cases):
        log = folder / f"run-{len(results)}.log"
        began = len(results)
        results += _run_from(cases, began, folder, {**os.environ, **env}, log, limit, runner)
        if len(results) < len(cases) and not (len(results) > began and results[-1].get("broken")):
            results.append({"error": f"the process ended: {log.read_text(errors='replace')[-3000:]}"})
    return results


def _run_from(
    cases: Sequence[Mapping[str, Any]],
    first: int,
    folder: Path,
    env: dict[str, str],
    log: Path,
    limit: float,
    runner: str,
) -> Iterator[Result]:
    """What the process says until it ends; the last result is ``broken`` where it said that it cannot go on."""
    command = module(runner, json.dumps([*cases]), str(first))
    with log.open("wb") as errors:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    lines = process.stdout
    watch = threading.Timer(limit, process.kill)
    watch.start()
    result: Result | None = None
    try:
        for line in lines:
            if not line.startswith("{"):
                continue
            watch.cancel()
            watch = threading.Timer(limit, process.kill)
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
