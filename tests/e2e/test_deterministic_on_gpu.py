"""``--enable-deterministic-inference``: a request has the same answer, to the bit, alone and in any company.

Recipe bf16 is stock SGLang; low recipes keep the promise too, and a request that asks for BF16 prefill has stock
SGLang's answer beside low ones.  Four servers that start side by side; about two minutes in all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_servers import ids, outputs
from tests.support.server import Server

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(60)]

CHUNK = 256
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
FLAGS = [
    *(
        "--enable-deterministic-inference",
        "--disable-radix-cache",
        "--attention-backend",
        "fa3" if HOPPER else "triton",
    ),
    *("--random-seed", "1", "--chunked-prefill-size", str(CHUNK), "--cuda-graph-max-bs-decode", "16"),
    *("--mem-fraction-static", "0.2"),
]
# of Triton's attention in 0.5.17, which wants prompts cut at multiples of it and otherwise waits for ever
ENV = {"SGLANG_TRITON_PREFILL_TRUNCATION_ALIGN_SIZE": str(CHUNK)}
LOW = {"fp8": "fp8", "nvfp4-emulated": "nvfp4"}  # recipe -> what is counted
LENGTHS = (40, 300, 7, 129, 640, 1)
NEW = 24
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
BF16: dict[str, Any] = {"custom_params": {"mixquant": {"prefill": "bf16"}}}

Answer = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def deterministic(tiny_model: Path, logs: Path) -> Iterator[dict[str, Server]]:
    """Stock, and a server for each recipe."""
    ours = ["--quantization", "mixquant", "--mixquant-recipe"]
    with ExitStack() as running:
        plain = ENV | {"SGLANG_PLUGINS": "none"}
        started = {"stock": Server(tiny_model, logs, "deterministic-stock", *FLAGS, env=plain)}
        for name in ("bf16", *LOW):
            started[name] = Server(tiny_model, logs, f"deterministic-{name}", *FLAGS, *ours, name, env=ENV)
        for server in started.values():
            running.callback(server.__exit__)
        for server in started.values():
            server.wait()
        yield started


PROMPTS = [ids(random.Random(length), length) for length in LENGTHS]


def alone(server: Server, **sampling: Any) -> list[Answer]:
    """Tokens and logprobs of each prompt, one after another."""
    turns = [server.generate(prompt, NEW, return_logprob=True, sampling=sampling) for prompt in PROMPTS]
    return answers(turns)


def answers(turns: list[Any]) -> list[Answer]:
    found = outputs(turns)
    assert not any(cached for _, _, cached in found)
    return [(tokens, logprobs) for tokens, logprobs, _ in found]


def together(server: Server, seed: int, others: int, *, bf16: frozenset[int] = frozenset()) -> list[Answer]:
    """The same of all prompts in one batch, among ``others`` more, in an order of its own; prompts ``bf16`` ask for
    BF16 prefill."""
    rng = random.Random(seed)
    prompts = PROMPTS + [ids(rng, rng.randrange(1, 400)) for _ in range(others)]
    order = rng.sample(range(len(prompts)), len(prompts))
    params = [GREEDY | (BF16 if i in bf16 else {}) for i in order]
    body = {"input_ids": [prompts[i] for i in order], "sampling_params": params, "return_logprob": True}
    found = dict(zip(order, answers(server.post("/generate", body)), strict=True))
    return [found[i] for i in range(len(PROMPTS))]


class Counted:
    """What a server says it ran during the block: rows of prefill by precision, passes of prefill, rows of decode."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> Counted:
        self._before = self._server.state()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.5)  # a pass that overlaps with the answer of the last one
        before, after = self._before, self._server.state()
        tokens = after["tokens"]
        self.rows = {p: n - before["tokens"]["prefill"].get(p, 0) for p, n in tokens["prefill"].items()}
        self.passes = after["passes"]["prefill"] - before["passes"]["prefill"]
        self.decode = {p: n - before["tokens"]["decode"].get(p, 0) for p, n in tokens["decode"].items()}


@pytest.fixture(scope="module")
def stocks(deterministic: dict[str, Server]) -> list[Answer]:
    """Stock SGLang's answers to the prompts alone."""
    return alone(deterministic["stock"])


@pytest.mark.timeout(270)  # the servers start here
def test_stock_keeps_its_promise(deterministic: dict[str, Server], stocks: list[Answer]) -> None:
    """Without which nothing here could."""
    for seed, others in ((1, 0), (2, 6)):
        assert together(deterministic["stock"], seed, others) == stocks
    assert len({token for tokens, _ in stocks for token in tokens}) > 8, "a model that repeats one token"


def test_recipe_bf16_is_stock_in_any_company(deterministic: dict[str, Server], stocks: list[Answer]) -> None:
    server = deterministic["bf16"]
    assert alone(server) == stocks
    assert together(server, 3, 6) == stocks
    assert server.state()["fingerprint"] == "bf16" and server.state()["tokens"]["prefill"].keys() == {"bf16"}


@pytest.mark.parametrize("recipe", LOW)
def test_low_rows_do_not_depend_on_company(deterministic: dict[str, Server], stocks: list[Answer], recipe: str) -> None:
    server, low = deterministic[recipe], LOW[recipe]
    with Counted(server) as one_by_one:
        first = alone(server)
    assert first != stocks, "as if nothing were low"
    with Counted(server) as in_one_batch:
        assert together(server, 4, 0) == first
    for counted in (one_by_one, in_one_batch):
        assert counted.rows == {low: sum(LENGTHS) - len(LENGTHS), "bf16": len(LENGTHS)}
        steps = len(LENGTHS) * NEW  # overlap scheduling runs one more step before it sees the end
        assert counted.decode.keys() == {"bf16"} and steps - len(LENGTHS) <= counted.decode["bf16"] <= steps
    chunks = sum(-(-length // CHUNK) for length in LENGTHS)
    assert one_by_one.passes == chunks > in_one_batch.passes, "nobody had company"
    for seed, others in ((5, 3), (6, 10)):
        assert together(server, seed, others) == first
    assert server.state()["deterministic"] is True


@pytest.mark.parametrize("recipe", LOW)
def test_a_bf16_request_beside_low_ones_is_stocks(
    deterministic: dict[str, Server], stocks: list[Answer], recipe: str
) -> None:
    """Alone it is a pass that is BF16 for all rows; in company its rows are protected ones of a low pass."""
    server = deterministic[recipe]
    assert alone(server, **BF16) == stocks
    low = alone(server)
    asked = frozenset({1, 3})
    found = together(server, 7, 6, bf16=asked)
    assert found == [stocks[i] if i in asked else low[i] for i in range(len(PROMPTS))]
