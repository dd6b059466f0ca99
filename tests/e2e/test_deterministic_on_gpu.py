"""``--enable-deterministic-inference`` with recipe bf16: stock SGLang's answers, alone and in company.

Two servers, side by side; about three minutes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_servers import ids, outputs
from tests.support.server import Server

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(1200)]

FLAGS = [
    *("--enable-deterministic-inference", "--attention-backend", "triton", "--mem-fraction-static", "0.3"),
    *("--random-seed", "1", "--chunked-prefill-size", "256", "--cuda-graph-max-bs-decode", "16"),
]
LENGTHS = (40, 300, 7, 129, 640)


@pytest.fixture(scope="module")
def deterministic(tiny_model: Path, logs: Path) -> Iterator[tuple[Server, Server]]:
    """Stock, and recipe bf16."""
    ours = ["--quantization", "mixquant", "--mixquant-recipe", "bf16"]
    with ExitStack() as running:
        started = [
            Server(tiny_model, logs, "deterministic-stock", *FLAGS, env={"SGLANG_PLUGINS": "none"}),
            Server(tiny_model, logs, "deterministic-bf16", *FLAGS, *ours),
        ]
        for server in started:
            running.callback(server.__exit__)
        for server in started:
            server.wait()
        yield started[0], started[1]


def answers(server: Server, *, together: bool) -> list[Any]:
    """Tokens and logprobs of each prompt, computed anew."""
    server.flush()
    prompts = [ids(random.Random(length), length) for length in LENGTHS]
    with ThreadPoolExecutor(len(prompts) if together else 1) as pool:
        turns = pool.map(lambda prompt: server.generate(prompt, 24, return_logprob=True), prompts)
        return [(tokens, logprobs) for tokens, logprobs, _ in outputs([*turns])]


def test_recipe_bf16_is_stock_and_does_not_depend_on_company(deterministic: tuple[Server, Server]) -> None:
    stock, control = deterministic
    alone = answers(stock, together=False)
    assert answers(stock, together=True) == alone, "SGLang itself does not keep its promise here"
    assert answers(control, together=False) == alone
    assert answers(control, together=True) == alone
    assert control.state()["fingerprint"] == "bf16" and control.state()["tokens"]["prefill"].keys() == {"bf16"}
