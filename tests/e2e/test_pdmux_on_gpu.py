"""PD multiplexing on a GPU: prompts a layer at a time on one stream, decode on another, each on SMs of its own.

Three servers, stock SGLang, recipe bf16 and auto, side by side; about four minutes.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from mixquant_sglang.versions.dialect import dialect
from tests.e2e.test_servers import BF16_POLICY, conversation, ids, outputs, together
from tests.support import plugins
from tests.support.server import Server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(2400),
]

# Budgets of rows times layers: one layer a call, so that decode steps come between all of them.
CONFIG = "sm_group_num: 8\nsplit_forward_token_budget: 1\n"
FLAGS = ["--enable-pdmux", "--chunked-prefill-size", "-1", "--disable-overlap-schedule", "--enable-cache-report"]
FLAGS += ["--random-seed", "1", "--mem-fraction-static", "0.2", "--cuda-graph-max-bs-decode", "16"]


STEPS = 1500


@pytest.fixture(scope="module")
def servers(tiny_model: Path, logs: Path) -> Iterator[dict[str, Server]]:
    if not dialect().multiplexes():
        pytest.skip("this SGLang's own multiplexing does not start")
    folder = logs / "pdmux"
    folder.mkdir()
    config = folder / "pdmux.yaml"
    config.write_text(CONFIG)
    spy = plugins.write(folder, "spy_of_ranks", plugins.RANKS)
    with ExitStack() as running:
        started = {}
        for name in ("stock", "bf16", "auto"):
            (folder / name).mkdir()
            ours = [] if name == "stock" else ["--quantization", "mixquant", "--mixquant-recipe", name]
            env = {"SGLANG_PLUGINS": "none"} if name == "stock" else {"RANKS_FOLDER": str(folder / name)}
            flags = [*FLAGS, "--pdmux-config-path", str(config), *ours]
            started[name] = Server(tiny_model, folder, f"pdmux-{name}", *flags, env=env, pythonpath=[spy])
            running.callback(started[name].__exit__)
        for server in started.values():
            server.wait()
        yield started


def prompts(count: int, seed: int) -> list[list[int]]:
    """No two of which begin alike, so that none is found in the cache."""
    rng = random.Random(seed)
    return [[100 + i, *ids(rng, rng.randrange(40, 400))] for i in range(count)]


def rows_run(server: Server, name: str) -> dict[str, int]:
    """By mode: those of all calls of the model."""
    (file,) = (server.log.parent / name).glob("*.json")
    found: dict[str, int] = json.loads(file.read_text())["rows"]
    return found


def load(servers: dict[str, Server], name: str, asked: list[list[int]]) -> list[dict[str, Any]]:
    """Answers of 8 to 20 tokens, asked for at once; xfail where the server ends as stock SGLang 0.5.23 does, if stock
    SGLang has ended under the same prompts, or does now."""
    server = servers[name]
    before = server.log.stat().st_size

    def ask(i: int, prompt: list[int]) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = server.generate(prompt, 8 + 3 * (i % 5))
            return answer
        except (AssertionError, requests.RequestException):
            return None

    answers = together([partial(ask, i, prompt) for i, prompt in enumerate(asked)])
    if None in answers:
        said = server.log.read_text(errors="replace")[before:]
        assert "device-side assert" in said and "event_loop_pdmux" in said, said[-6000:]
        if name != "stock" and not servers["stock"].gone():
            load(servers, "stock", asked)  # xfail
            raise AssertionError(f"stock SGLang lives under this load:\n{said[-6000:]}")
        pytest.xfail("SGLang's own, with and without mixquant: an index out of bounds on the GPU, under load")
    return answers


def test_recipe_bf16_is_stock(servers: dict[str, Server]) -> None:
    stock, control = (outputs(conversation(servers[name], 11)) for name in ("stock", "bf16"))
    assert control == stock and any(cached for _, _, cached in stock)
    low = outputs(conversation(servers["auto"], 11))
    assert low != stock


def test_rows_are_counted_exactly_under_load(servers: dict[str, Server], tiny_model: Path) -> None:
    server = servers["auto"]
    server.flush()
    asked = prompts(24, 5)
    before, ran = server.state(), Counter(rows_run(server, "auto"))
    load(servers, "auto", asked)
    after = server.state()
    ran = Counter(rows_run(server, "auto")) - ran
    low = after["precision"]["prefill"]
    new, made = sum(map(len, asked)), sum(7 + 3 * (i % 5) for i in range(len(asked)))

    def grew(phase: str) -> dict[str, int]:
        counts = {p: n - before["tokens"][phase].get(p, 0) for p, n in after["tokens"][phase].items()}
        return {p: n for p, n in counts.items() if n}

    assert low != "bf16" and grew("prefill") == {low: new - len(asked), "bf16": len(asked)}
    assert grew("decode") == {"bf16": made}
    layers = json.loads((tiny_model / "config.json").read_text())["num_hidden_layers"]
    assert ran["SPLIT_PREFILL"] == layers * new and not ran["EXTEND"]


def test_prompts_beside_decode_are_what_they_are_alone(servers: dict[str, Server]) -> None:
    """First tokens of low prompts while others decode; and what decodes beside them is stock's."""
    server, asked = servers["auto"], prompts(12, 6)
    long = [7, *ids(random.Random(7), 60)]

    def tokens(answer: dict[str, Any]) -> list[int]:
        found: list[int] = answer["output_ids"]
        return found

    for each in servers.values():
        each.flush()
    expected = tokens(servers["stock"].generate(long, STEPS))
    alone = [tokens(server.generate(prompt, 1)) for prompt in asked]
    server.flush()
    with ThreadPoolExecutor(1) as pool:
        decoding = pool.submit(server.generate, long, STEPS, sampling=BF16_POLICY)
        time.sleep(0.3)
        beside = [tokens(server.generate(prompt, 1)) for prompt in asked]
        assert not decoding.done(), "more steps, or it was seen beside nothing"
        assert beside == alone
        assert tokens(decoding.result()) == expected


@pytest.mark.parametrize("name", ["stock", "bf16"])
def test_the_load_is_served_in_bf16(servers: dict[str, Server], name: str) -> None:
    """Last, since it has ended both on an H200, and not ``auto``."""
    servers[name].flush()
    answers = load(servers, name, prompts(24, 5))
    assert [len(answer["output_ids"]) for answer in answers] == [8 + 3 * (i % 5) for i in range(24)]
