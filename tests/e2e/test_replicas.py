"""Two replicas behind SGLang's data-parallel controller, and two tokenizer workers: one server, beside ``low``.

Its start is the cost, about 100 seconds on a CPU; the tests take 10.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from mixquant_sglang.versions import machine
from tests.e2e.test_servers import BF16_POLICY, conversation, ids, outputs
from tests.support.server import ON_GPU, Server
from tests.support.servers import FLAGS, LOW_RECIPE, Servers

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(ON_GPU, reason="two replicas take two GPUs: test_parallel_on_gpus.py"),
]

# 0.5.23 wants to be told the cores of each process where there are more of them than NUMA nodes.  uvicorn ends a worker
# that does not answer for so many seconds, as one that still imports SGLang on a busy machine
ENV = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "600"}
ENV |= {} if machine.sglang_version() == "0.5.17" else {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
SIZES = ["--dp-size", "2", "--tokenizer-worker-num", "2"]


@pytest.fixture(scope="module")
def replicas(servers: Servers, tiny_model: Path, logs: Path) -> Iterator[Server]:
    flags = [*FLAGS, "--quantization", "mixquant", "--mixquant-recipe", LOW_RECIPE, "--enable-metrics"]
    with Server(tiny_model, logs, "replicas", *flags, *SIZES, env=ENV) as server:
        yield server


def states(server: Server) -> list[dict[str, Any]]:
    """Of each replica, in an order that may differ from call to call."""
    found = requests.get(server.url + "/server_info", timeout=60).json()["internal_states"]
    return [state["mixquant"] for state in found]


def counted(server: Server) -> list[tuple[int, int, int]]:
    """(low prompt rows, protected rows, decode rows) of each replica, sorted."""
    time.sleep(0.5)  # a pass that overlaps with the answer of the last one
    all_states = states(server)
    assert not any(precision != "bf16" for s in all_states for precision in s["tokens"]["decode"])
    return sorted(
        (s["tokens"]["prefill"].get(s["precision"]["prefill"], 0), s["protected_rows"], s["tokens"]["decode"]["bf16"])
        for s in all_states
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_each_replica_computes_what_one_server_does(servers: Servers, replicas: Server, rank: int) -> None:
    assert outputs(conversation(replicas, 11 + rank, routed_dp_rank=rank)) == outputs(
        conversation(servers.low, 11 + rank)
    )


def test_each_replica_counts_its_own(replicas: Server) -> None:
    assert len(states(replicas)) == 2 and len({s["fingerprint"] for s in states(replicas)}) == 1
    before = counted(replicas)
    for rank, rows in ((0, 100), (1, 57), (1, 31)):
        replicas.generate(ids(random.Random(rows), rows), 9, routed_dp_rank=rank)
    after = counted(replicas)
    grown = [
        sorted(tuple(a - b for a, b in zip(one, other, strict=True)) for one, other in zip(after, order, strict=True))
        for order in (before, before[::-1])
    ]
    # the last row of each prompt is protected; the first of nine tokens is the prefill's
    assert sorted([(99, 1, 8), (86, 2, 16)]) in grown


def test_metrics_of_each_replica(replicas: Server) -> None:
    text = requests.get(replicas.url + "/metrics", timeout=60).text
    found: dict[str, float] = {}
    for labels, value in re.findall(r"^mixquant:forward_tokens_total{(.*)} (\S+)$", text, re.MULTILINE):
        if 'phase="decode"' in labels:
            rank = re.search(r'dp_rank="(\d)"', labels)
            assert rank is not None
            found[rank[1]] = found.get(rank[1], 0) + float(value)
    assert sorted(found) == ["0", "1"]
    assert sorted(found.values()) == sorted(float(decoded) for _, _, decoded in counted(replicas))


def answers(server: Server, path: str, body: dict[str, Any], times: int = 16) -> list[requests.Response]:
    """To as many connections at once, so that both tokenizer workers take some."""

    def one(_: int) -> requests.Response:
        return requests.post(server.url + path, json=body, headers={"Connection": "close"}, timeout=300)

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(one, range(times)))


@pytest.mark.parametrize("path", ["/generate", "/v1/messages"])
def test_each_worker_answers_400_to_a_bad_policy(replicas: Server, path: str) -> None:
    """``/v1/messages`` has no custom_params: SGLang drops them after our layer has read the body."""
    bad = {"custom_params": {"mixquant": {"prefill": "fp8"}}}
    body = {
        "/generate": {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1, **bad}},
        "/v1/messages": {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}], **bad},
    }[path]
    found = answers(replicas, path, body)
    assert {answer.status_code for answer in found} == {400}
    assert all("allowed: {'prefill': 'bf16'}" in answer.text for answer in found)


def test_each_worker_hands_on_a_good_policy(servers: Servers, replicas: Server) -> None:
    """Each of 8 prompts is one BF16 pass, though SGLang's model of the body drops what asked for it."""
    prompt = ids(random.Random(21), 80)
    control = servers.control.generate(prompt, 12, return_logprob=True)
    for rank in (0, 1):
        mine = replicas.generate(prompt, 12, return_logprob=True, routed_dp_rank=rank, sampling=BF16_POLICY)
        assert outputs([mine])[0][:2] == outputs([control])[0][:2]
    before = counted(replicas)
    body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}], **BF16_POLICY}
    assert {answer.status_code for answer in answers(replicas, "/v1/messages", body, 8)} == {200}
    after = counted(replicas)
    assert sum(low for low, _, _ in after) == sum(low for low, _, _ in before)
