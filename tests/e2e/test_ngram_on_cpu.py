"""Speculative decoding by a whole server without a GPU: NGRAM, with plain torch for what SGLang needs a GPU for.

Two servers, stock SGLang and recipe auto, which start together: about 90 s on two cores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_servers import BF16_POLICY, ids, together
from tests.support import ngram_shim, plugins
from tests.support.server import ON_GPU, Server

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU, reason="tests/e2e/test_speculation_on_gpu.py has the same with SGLang's own kernels"),
]

DRAFTED, TOKENS = 4, 32
FLAGS = ["--random-seed", "1", "--sleep-on-idle", "--chunked-prefill-size", "128", "--speculative-algorithm", "NGRAM"]
FLAGS += ["--speculative-num-draft-tokens", str(DRAFTED), "--speculative-ngram-max-bfs-breadth", "1"]
KINDS = ("stock", "auto")


@pytest.fixture(scope="module")
def servers(tiny_model: Path, logs: Path) -> Iterator[dict[str, Server]]:
    folder = logs / "ngram"
    folder.mkdir()
    shim = plugins.write(folder, "a_ngram_shim", Path(ngram_shim.__file__).read_text())
    with ExitStack() as running:
        started = {}
        for kind in KINDS:
            env = {"SGLANG_PLUGINS": "a_ngram_shim"} if kind == "stock" else {}
            own = [] if kind == "stock" else ["--quantization", "mixquant"]
            started[kind] = Server(tiny_model, folder, kind, *FLAGS, *own, env=env, pythonpath=[shim])
            running.callback(started[kind].__exit__)
        for server in started.values():
            server.wait()
        yield started


def conversation(server: Server, **sampling: Any) -> list[dict[str, Any]]:
    """Three turns that grow one prompt, greedy."""
    server.flush()
    rng = random.Random(17)
    prompt, turns = ids(rng, 200), []
    for length in (90, 7, 0):
        turns.append(server.generate(prompt, TOKENS, sampling=sampling))
        prompt = [*prompt, *turns[-1]["output_ids"], *ids(rng, length)]
    return turns


def test_with_bf16_prefill_it_is_stock_token_for_token(servers: dict[str, Server]) -> None:
    stock, ours = conversation(servers["stock"]), conversation(servers["auto"], **BF16_POLICY)
    for field in ("spec_verify_ct", "cached_tokens"):
        assert [turn["meta_info"][field] for turn in stock] == [turn["meta_info"][field] for turn in ours]
    assert [turn["output_ids"] for turn in stock] == [turn["output_ids"] for turn in ours]
    low = conversation(servers["auto"])
    assert [turn["output_ids"] for turn in low] != [turn["output_ids"] for turn in stock]


def test_rows_are_counted_exactly(servers: dict[str, Server]) -> None:
    server = servers["auto"]
    conversation(server)
    before = server.state()["tokens"]
    turns = conversation(server)
    counted = {
        phase: {p: n - before[phase].get(p, 0) for p, n in rows.items() if n - before[phase].get(p, 0)}
        for phase, rows in server.state()["tokens"].items()
    }
    verified = sum(turn["meta_info"]["spec_verify_ct"] for turn in turns)
    # Of what a turn prefills, chunks of 128 rows and the rest, one row is the last of its prompt.
    rows = sum(turn["meta_info"]["prompt_tokens"] - turn["meta_info"]["cached_tokens"] for turn in turns)
    prefill = {"nvfp4+fp8": rows - 3, "bf16": 3}
    assert counted == {"prefill": prefill, "decode": {}, "verify": {"bf16": DRAFTED * verified}}
    assert verified < 3 * (TOKENS - 1)  # some drafted token was right
    assert server.state()["passes"]["decode"] == 0


def test_requests_side_by_side(servers: dict[str, Server]) -> None:
    server = servers["auto"]
    rng = random.Random(18)
    prompts = [ids(rng, 30 + 11 * i) for i in range(4)]
    server.flush()
    before = server.state()["protected_rows"]
    answers = together([partial(server.generate, prompt, 8) for prompt in prompts])
    assert all(len(answer["output_ids"]) == 8 for answer in answers)
    assert server.state()["protected_rows"] - before == 4
    log = server.log.read_text()
    assert "speculative decoding (NGRAM): drafted rows are verified in bf16" in log
    assert "unread rows left out behind the last layer's attention" in log
