"""A server whose scheduler is a Ray actor (``--use-ray``): one server, beside ``low``; about 90 seconds on a CPU.

Ray is no dependency of SGLang's: ``uv pip install ray``.  On a CPU the cluster says that it has a GPU, since SGLang's
actors ask for one, and stock SGLang's actor ends when it chooses it, whatever ``--device`` says.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.e2e.test_servers import BF16_POLICY, conversation, ids, outputs
from tests.support import plugins, ray_cluster
from tests.support.server import ON_GPU, Server
from tests.support.servers import FLAGS, LOW_RECIPE, Servers

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: uv pip install ray"),
]


@pytest.fixture(scope="module")
def actor(servers: Servers, tiny_model: Path, logs: Path) -> Iterator[Server]:
    shim = [] if ON_GPU else [plugins.write(logs, "a_ray_shim", ray_cluster.SHIM)]
    ours = ["--use-ray", "--quantization", "mixquant", "--mixquant-recipe", LOW_RECIPE]
    with (
        ray_cluster.cluster(1, logs / "ray-cluster.log", plugins.on_path(shim)) as env,
        Server(tiny_model, logs, "ray", *FLAGS, *ours, env=env, pythonpath=shim) as server,
    ):
        yield server


def test_the_scheduler_is_an_actor(actor: Server) -> None:
    """Of a process that the launcher did not start."""
    pids = {int(pid) for pid in re.findall(r"SchedulerActor pid=(\d+)", actor.log.read_text())}
    assert len(pids) == 1
    (status,) = (Path(f"/proc/{pid}/stat").read_text() for pid in pids)
    session = int(status.rpartition(")")[2].split()[3])
    assert session != os.getsid(actor.process.pid)


def test_an_actor_computes_what_a_process_does(servers: Servers, actor: Server) -> None:
    mine = outputs(conversation(actor, 11))
    assert mine == outputs(conversation(servers.low, 11))
    assert all(cached > 0 for _, _, cached in mine[1:])


def test_it_counts_and_names_what_it_ran(servers: Servers, actor: Server) -> None:
    """By the recipe that the launcher was asked for."""
    before = actor.state()
    assert before["fingerprint"] == servers.low.state()["fingerprint"]
    actor.generate(ids(random.Random(5), 100), 9)
    time.sleep(0.5)  # a pass that overlaps with the answer of the last one
    after = actor.state()
    low = before["precision"]["prefill"]
    grew = {p: n - before["tokens"]["prefill"].get(p, 0) for p, n in after["tokens"]["prefill"].items()}
    assert low != "bf16" and grew == {low: 99, "bf16": 1}
    assert after["protected_rows"] - before["protected_rows"] == 1
    decoded = after["tokens"]["decode"]["bf16"] - before["tokens"]["decode"].get("bf16", 0)
    assert 8 <= decoded <= 9 and after["tokens"]["decode"].keys() == {"bf16"}


def test_a_policy_reaches_it(servers: Servers, actor: Server) -> None:
    prompt = ids(random.Random(21), 80)
    control = servers.control.generate(prompt, 12, return_logprob=True)
    mine = actor.generate(prompt, 12, return_logprob=True, sampling=BF16_POLICY)
    assert outputs([mine])[0][:2] == outputs([control])[0][:2]
    bad = {"max_new_tokens": 1, "custom_params": {"mixquant": {"prefill": "fp8"}}}
    answer = actor.post("/generate", {"input_ids": prompt, "sampling_params": bad}, ok=False)
    assert answer.status_code == 400 and "allowed: {'prefill': 'bf16'}" in answer.text
