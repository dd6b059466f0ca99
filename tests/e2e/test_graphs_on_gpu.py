"""On a GPU: passes that ``min_tokens`` keeps in BF16 replay captured prefill graphs and are stock SGLang's to the last
bit, and no kernel of ours is compiled while a server serves."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.test_servers import BF16_POLICY, ids, outputs, together
from tests.support import plugins
from tests.support.server import Server
from tests.support.servers import FLAGS

pytestmark = [pytest.mark.server, pytest.mark.gpu, pytest.mark.timeout(2400)]

LEAST = 90  # between two of the sizes that SGLang captures


@pytest.fixture(scope="module")
def pair(tiny_model: Path, logs: Path) -> Iterator[tuple[Server, Server]]:
    """Stock SGLang, and mixquant with ``min_tokens``."""
    folder = logs / "min_tokens"
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"version: 1\nprefill: {{precision: fp8, min_tokens: {LEAST}}}\n")
    shim, env = plugins.write(folder, "cpu_shim", plugins.CPU_SHIM), {"SGLANG_PLUGINS": "cpu_shim"}
    flags = ["--quantization", "mixquant", "--mixquant-recipe", str(recipe)]
    spy = plugins.write(folder, "compiler_spy", plugins.COMPILER_SPY)
    spy_env = {"COMPILED_FILE": str(folder / "compiled.txt"), "MIXQUANT_MIN_TOKENS": ""}
    with ExitStack() as running:
        servers = (
            Server(tiny_model, folder, "stock", *FLAGS, env=env, pythonpath=[shim]),
            Server(tiny_model, folder, "low", *FLAGS, *flags, env=spy_env, pythonpath=[spy]),
        )
        for server in servers:
            running.callback(server.__exit__)
        for server in servers:
            server.wait()
        yield servers


def test_short_passes_replay_graphs_and_are_stocks(pair: tuple[Server, Server]) -> None:
    """And of a single row, for which SGLang has none: a graph of four rows would pad too much for it."""
    rng = random.Random(30)
    lengths = (1, 3, 4, 17, 64, 65, LEAST - 1, LEAST, LEAST + 7)
    seen: dict[int, str] = {}
    for length in lengths:
        prompt = ids(rng, length)
        answers, replayed, lines = [], [], []
        for server in pair:
            server.flush()
            mark = len(server.log.read_text())
            answers.append(outputs([server.generate(prompt, 4, return_logprob=True)]))
            lines = [line for line in server.log.read_text()[mark:].splitlines() if "Prefill batch" in line]
            assert len(lines) == 1, lines
            replayed.append(re.search(r"cuda graph: (\w+)", lines[0])[1])  # type: ignore[index]
        if length < LEAST:
            assert answers[0] == answers[1]
        precision = re.search(r"#(bf16|fp8)-token: (\d+)", lines[0])
        assert precision, lines[0]
        assert replayed == [str(length > 1), "True"], (length, lines[0])
        seen[length] = precision[1]
    assert seen == {length: "bf16" if length < LEAST else "fp8" for length in lengths}


def test_nothing_of_ours_is_compiled_while_serving(pair: tuple[Server, Server]) -> None:
    low = pair[1]
    compiled = low.log.parent / "compiled.txt"

    def ours() -> list[str]:
        return [name for name in compiled.read_text().splitlines() if name.startswith("mixquant_sglang.")]

    before = ours()
    print(f"compiled at load: {len(before)}")
    assert len(before) > 5
    rng = random.Random(31)
    for count in (1, 2, 3, 5, 9, 16, 17, 33, 64, 65, 90):  # as many last prompt tokens, BF16 rows, in one pass
        together([partial(low.generate, ids(rng, LEAST + rng.randrange(7)), 2) for _ in range(count)])
    for length in (LEAST, LEAST + 1, 128, 129, 200, 333, 700):
        low.generate(ids(rng, length), 2)
        low.generate(ids(rng, length), 2, sampling=BF16_POLICY)
        low.generate(ids(rng, length), 2, return_logprob=True, logprob_start_len=0)
    assert ours()[len(before) :] == []
