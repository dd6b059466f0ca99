"""Two replicas behind SGLang's data-parallel controller, and two tokenizer workers: one server, beside ``low``.

Its start is the cost, about 100 seconds on a CPU; the tests take 30.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.torch import load_file, save_file

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
# that does not answer for so many seconds, as one that still imports SGLang on a busy machine, or one that we stop
ENV = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "600"}
ENV |= {} if machine.sglang_version() == "0.5.17" else {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
SIZES = ["--dp-size", "2", "--tokenizer-worker-num", "2"]
RANKS, WORKERS = (0, 1), (0, 1)
NAME = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def replicas(servers: Servers, tiny_model: Path, logs: Path) -> Iterator[Server]:
    flags = [*FLAGS, "--quantization", "mixquant", "--mixquant-recipe", LOW_RECIPE, "--enable-metrics"]
    with Server(tiny_model, logs, "replicas", *flags, *SIZES, env=ENV) as server:
        yield server


@contextmanager
def only(server: Server, worker: int) -> Iterator[None]:
    """Has one of the tokenizer workers take all connections: the others are stopped meanwhile."""
    found = re.findall(r"Start multi-tokenizer worker process (\d+)", server.log.read_text())
    assert len(found) == len(WORKERS), found
    others = [int(pid) for i, pid in enumerate(found) if i != worker]
    try:
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def states(server: Server) -> dict[int, dict[str, Any]]:
    """Of each replica; they answer in any order."""
    found = requests.get(server.url + "/server_info", timeout=60).json()["internal_states"]
    return {state["mixquant"]["dp_rank"]: state["mixquant"] for state in found}


def counted(server: Server) -> dict[int, tuple[int, int, int]]:
    """(low prompt rows, protected rows, decode rows) of each replica."""
    time.sleep(0.5)  # a pass that overlaps with the answer of the last one
    all_states = states(server)
    assert not any(precision != "bf16" for s in all_states.values() for precision in s["tokens"]["decode"])
    return {
        rank: (
            s["tokens"]["prefill"].get(s["precision"]["prefill"], 0),
            s["protected_rows"],
            s["tokens"]["decode"]["bf16"],
        )
        for rank, s in all_states.items()
    }


def grown(after: dict[int, tuple[int, ...]], before: dict[int, tuple[int, ...]], rank: int) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(after[rank], before[rank], strict=True))


@pytest.mark.parametrize("rank", RANKS)
def test_each_replica_computes_what_one_server_does(servers: Servers, replicas: Server, rank: int) -> None:
    """Cache hits among it: each has a radix tree of its own."""
    mine = outputs(conversation(replicas, 11 + rank, routed_dp_rank=rank))
    assert mine == outputs(conversation(servers.low, 11 + rank))
    assert all(cached > 0 for _, _, cached in mine[1:])


def test_each_replica_counts_its_own(servers: Servers, replicas: Server) -> None:
    assert states(replicas).keys() == set(RANKS)
    # one recipe, one name of the KV, and it is that of a server alone
    assert {s["fingerprint"] for s in states(replicas).values()} == {servers.low.state()["fingerprint"]}
    before = counted(replicas)
    for rank, rows in ((0, 100), (1, 57), (1, 31)):
        replicas.generate(ids(random.Random(rows), rows), 9, routed_dp_rank=rank)
    after = counted(replicas)
    # The last row of each prompt is protected.  The first of nine tokens is the prefill's; overlap scheduling runs one
    # more step before it sees the end.
    for rank, low, prompts in ((0, 99, 1), (1, 86, 2)):
        grew = grown(after, before, rank)
        assert grew[:2] == (low, prompts) and 8 * prompts <= grew[2] <= 9 * prompts


def test_metrics_of_each_replica(replicas: Server) -> None:
    text = requests.get(replicas.url + "/metrics", timeout=60).text
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for name, labels, value in re.findall(r"^mixquant:(\w+){(.*)} (\S+)$", text, re.MULTILINE):
        rank = re.search(r'dp_rank="(\d)"', labels)
        assert rank is not None, f"{name} of no replica"
        if name != "forward_tokens_total" or 'phase="decode"' in labels:
            found[name, rank[1]] += float(value)
    for rank, (_, protected, decoded) in counted(replicas).items():
        assert found["forward_tokens_total", str(rank)] == decoded > 0
        assert found["protected_rows_total", str(rank)] == protected > 0
        assert found["layers", str(rank)] == sum(states(replicas)[rank]["layers"].values())
        assert found["extra_weight_bytes", str(rank)] == states(replicas)[rank]["extra_weight_bytes"] > 0


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/messages"])
def test_each_worker_answers_400_to_a_bad_policy(replicas: Server, path: str, worker: int) -> None:
    """``/v1/messages`` has no custom_params: SGLang drops them after our layer has read the body."""
    bad = {"custom_params": {"mixquant": {"prefill": "fp8"}}}
    body = {
        "/generate": {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1, **bad}},
        "/v1/completions": {"model": "m", "max_tokens": 1, "prompt": [5, 6, 7], **bad},
        "/v1/messages": {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "hello"}], **bad},
    }[path]
    with only(replicas, worker):
        answer = replicas.post(path, body, ok=False)
    assert answer.status_code == 400 and "allowed: {'prefill': 'bf16'}" in answer.text


@pytest.mark.parametrize("worker", WORKERS)
def test_each_worker_hands_on_a_good_policy(servers: Servers, replicas: Server, worker: int) -> None:
    """To each replica; and where SGLang's model of the body drops what asks for it."""
    prompt = ids(random.Random(21 + worker), 80)
    control = servers.control.generate(prompt, 12, return_logprob=True)
    with only(replicas, worker):
        for rank in RANKS:
            mine = replicas.generate(prompt, 12, return_logprob=True, routed_dp_rank=rank, sampling=BF16_POLICY)
            assert outputs([mine])[0][:2] == outputs([control])[0][:2]
        before = counted(replicas)
        hello = {"role": "user", "content": f"hello from {worker}"}
        for _ in range(4):
            replicas.post("/v1/messages", {"model": "m", "max_tokens": 2, "messages": [hello], **BF16_POLICY})
        after = counted(replicas)
    for rank in RANKS:  # they take turns
        low, protected, _ = grown(after, before, rank)
        assert low == 0 and protected > 0


def test_policies_of_all_endpoints(servers: Servers, replicas: Server, tiny_model: Path) -> None:
    """``scripts/fuzz``: good and bad ones at random endpoints, which replicas and workers share as it happens."""
    from scripts.tools import fuzz

    stock = servers.stock.url
    ran = fuzz.run(replicas.url, tiny_model, stock, seconds=600, seed=2026, steps=30, only=["policies"])
    seen = [*ran["seen"]]
    assert ran["steps"] == 30 and "policies: low" in seen
    assert all(any(name.startswith(f"policies: {what}") for name in seen) for what in ("refused", "bf16"))


# -- weights ---


def edited(model: Path, folder: Path, factor: float) -> Path:
    out = Path(shutil.copytree(model, folder))
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if NAME in tensors:
            tensors[NAME] *= factor
            save_file(tensors, file, metadata={"format": "pt"})
    return out


def answers(server: Server, prompt: list[int], *, ranks: tuple[int, ...] = ()) -> list[Any]:
    server.flush()
    routed: list[dict[str, int]] = [{"routed_dp_rank": rank} for rank in ranks] or [{}]
    return [outputs([server.generate(prompt, 8, return_logprob=True, **where)])[0] for where in routed]


def test_a_weight_update_reaches_each_replica(
    servers: Servers, replicas: Server, tiny_model: Path, tmp_path: Path
) -> None:
    """Prompt rows and decode rows of each take the new weights, as those of one server do."""
    prompt = ids(random.Random(31), 100)
    changed = edited(tiny_model, tmp_path / "changed", -1.0)
    (before,) = answers(servers.low, prompt)
    assert answers(replicas, prompt, ranks=RANKS) == [before, before]
    try:
        for server in (servers.low, replicas):
            said = server.post("/update_weights_from_disk", {"model_path": str(changed)})
            assert said["success"], said
        (after,) = answers(servers.low, prompt)
        assert after != before
        assert answers(replicas, prompt, ranks=RANKS) == [after, after]
    finally:
        servers.low.post("/update_weights_from_disk", {"model_path": str(tiny_model)})
    assert replicas.post("/update_weights_from_disk", {"model_path": str(tiny_model)})["success"]
    assert answers(replicas, prompt, ranks=RANKS) == [before, before]


def test_a_broken_weight_update_is_refused_by_each_replica(replicas: Server, tiny_model: Path, tmp_path: Path) -> None:
    prompt = ids(random.Random(32), 100)
    before = answers(replicas, prompt, ranks=RANKS)
    broken = edited(tiny_model, tmp_path / "broken", float("nan"))
    said = replicas.post("/update_weights_from_disk", {"model_path": str(broken)}, ok=False).json()
    assert not said["success"] and said["message"].count(f"{broken}: {NAME} ") == len(RANKS), said
    assert answers(replicas, prompt, ranks=RANKS) == before and before[0] == before[1]


def test_sglang_refuses_weights_from_tensors(replicas: Server) -> None:
    """Of replicas it takes weights from disk alone; it says why in its log."""
    said = replicas.post("/update_weights_from_tensor", {"serialized_named_tensors": ["AAAA"]}, ok=False)
    assert said.status_code == 500, said.text
    for _ in range(50):
        if re.search("Error: .* for update weights from tensor", replicas.log.read_text()):
            return
        time.sleep(0.2)
    raise AssertionError("SGLang did not say why")
