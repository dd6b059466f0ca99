"""Retraction: generated tokens that are prefilled again stay BF16 (``SGLANG_TEST_RETRACT`` makes SGLang retract)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.test_servers import FLAGS, Counted, Servers, ids, together
from tests.support import plugins
from tests.support.server import Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def servers(tiny_model: Path, logs: Path) -> Iterator[Servers]:
    folder = logs / "retraction"
    folder.mkdir()
    spy_file = folder / "spy.jsonl"
    env = {"SPY_FILE": str(spy_file), "SGLANG_TEST_RETRACT": "1"}
    spy_plugin = plugins.write(folder, "spy", plugins.SPY)
    flags = [*FLAGS, "--quantization", "mixquant"]
    with Server(tiny_model, folder, "retract", *flags, env=env, pythonpath=[spy_plugin]) as low:
        yield Servers(low, low, low, spy_file)


def test_split_of_retracted_requests(servers: Servers) -> None:
    rng = random.Random(20)
    with Counted(servers) as counted:
        calls = [partial(servers.low.generate, ids(rng, n), 40) for n in (50, 61, 45, 150)]
        answers = together(calls)
    counted.check()
    again = [
        request
        for batch in counted.batches
        for request in batch["requests"]
        if not request["decoding"] and request["prefix"] + request["new"] > request["prompt"]
    ]
    assert sum(a["meta_info"]["num_retractions"] for a in answers) > 0
    assert again, "nothing that was generated was prefilled again"
    assert all(a["meta_info"]["completion_tokens"] == 40 for a in answers)
