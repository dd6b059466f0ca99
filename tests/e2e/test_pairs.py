"""A prefill and a decode server behind SGLang's router, on the CPU over TCP: one pair for all tests of this file.

What a pair computes is held against the servers that the other end-to-end tests share: same prompt, same cached tokens,
same answer to the last bit.  The last tests kill one half after the other; the prefill server comes back, and a stock
decode server takes the other's place.
"""

from __future__ import annotations

import json
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.serve.pair import Pair, Plan, states
from scripts.serve.processes import free_port
from tests.e2e.test_servers import BF16_POLICY, ids, outputs
from tests.support import plugins
from tests.support.server import ON_GPU
from tests.support.servers import CHUNK, Servers

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(ON_GPU, reason="on GPUs scripts/bench_agent plays a pair"),
]
TURNS = (200, 7, 130, 0)  # new tokens after each
GENERATED = 24


class Played(Pair):
    """``generate`` as ``tests.support.server.Server`` has it, through the router."""

    def __init__(self, plan: Plan, logs: Path, spies: Path) -> None:
        super().__init__(plan, logs)
        self.spies = spies

    def post(self, path: str, body: dict[str, Any], *, timeout: float = 300) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout)

    def generate(self, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more.pop("sampling", {})}
        answer = self.post("/generate", {"input_ids": prompt, "sampling_params": params, **more})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def of(self, name: str, path: str, body: dict[str, Any] | None = None) -> requests.Response:
        """To one of the two, past the router."""
        return requests.post(self.plan.url(name) + path, json=body, timeout=300)

    def flush(self) -> None:
        for name in ("prefill", "decode"):
            for _ in range(100):
                if self.of(name, "/flush_cache").status_code == 200:
                    break
                time.sleep(0.2)
            else:
                raise AssertionError(f"the {name} server did not become idle")

    def states(self) -> list[dict[str, Any]]:
        return states([self.plan.url("prefill"), self.plan.url("decode")])

    def batches(self, name: str) -> list[dict[str, Any]]:
        file = self.spies / f"{name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def pair(tiny_model: Path, logs: Path) -> Iterator[Played]:
    folder = logs / "pair"
    folder.mkdir()
    spy = plugins.write(folder, "spy", plugins.SPY)
    path = plugins.on_path([spy])
    plan = Plan(
        str(tiny_model),
        free_port(),
        transfer="mooncake_tcp",
        both=("--random-seed", "1", "--chunked-prefill-size", str(CHUNK)),
        envs={
            name: {
                "OMP_NUM_THREADS": "1",
                "SPY_FILE": str(folder / f"{name}.jsonl"),
                "PYTHONPATH": path,
                "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",  # the router's questions run no passes
            }
            for name in ("prefill", "decode")
        },
    )
    with Played(plan, folder, folder) as running:
        yield running


def counted(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Of the prefill and of the decode server: what was counted between two ``states``."""
    found = []
    for old, new in zip(before, after, strict=True):
        tokens = {
            f"{phase} {precision}": n - old["tokens"][phase].get(precision, 0)
            for phase, by_precision in new["tokens"].items()
            for precision, n in by_precision.items()
        }
        tokens["protected"] = new["protected_rows"] - old["protected_rows"]
        found.append({name: n for name, n in tokens.items() if n})
    return found


def fits(pair: Played) -> int:
    """How often the decode server said so of the prefill server."""
    text = pair.processes["decode"].log.read_text()
    return len(re.findall(r"mixquant: the prefill server at \S+ fits", text))


# -- what each half is ---


def test_the_decode_server_keeps_no_packed_copies_and_says_so(pair: Played) -> None:
    prefill, decode = pair.states()
    assert (prefill["disaggregation"], decode["disaggregation"]) == ("prefill", "decode")
    assert prefill["layers"] == {"fp8": 24, "nvfp4": 8} and prefill["extra_weight_bytes"] > 0
    assert decode["layers"] == {"bf16": 32} and decode["extra_weight_bytes"] == 0
    assert decode["precision"] == {"prefill": "bf16", "decode": "bf16"}
    assert prefill["fingerprint"] == decode["fingerprint"], "keys and values have one name on both"
    text = pair.processes["decode"].log.read_text()
    assert "because a decode server keeps the copies that it decodes with, and no others" in text
    assert fits(pair) == 1, "asked once for all requests"


# -- what a pair computes is what one server computes ---


@pytest.mark.parametrize("policy", [None, BF16_POLICY], ids=["recipe", "bf16"])
def test_four_turns_equal_one_server_where_keys_and_values_are_equal(
    pair: Played, servers: Servers, policy: Any
) -> None:
    """From empty caches in each turn: prompts are prefilled whole, in equal chunks.  With BF16 prefill it is stock
    SGLang that a pair equals, else the one server of the same recipe; tokens and logprobs, to the last bit."""
    one = servers.low if policy is None else servers.stock
    more = {} if policy is None else {"sampling": policy}
    rng = random.Random(31)
    prompt = ids(rng, 300)
    seen = set()
    before = pair.states()
    rows = 0
    for new in TURNS:
        pair.flush()
        one.flush()
        ours = pair.generate(prompt, GENERATED, return_logprob=True, **more)
        theirs = one.generate(prompt, GENERATED, return_logprob=True)
        assert outputs([ours])[0][:2] == outputs([theirs])[0][:2]
        seen |= {*ours["output_ids"]}
        rows += len(prompt)
        prompt = [*prompt, *ours["output_ids"], *ids(rng, new)]
    assert len(seen) > 8, "a model that repeats one token"
    time.sleep(0.5)
    prefill, decode = counted(before, pair.states())
    low = before[0]["precision"]["prefill"]
    protected = rows if policy else len(TURNS)
    wanted = {f"prefill {low}": rows - protected, "prefill bf16": protected, "protected": protected}
    assert prefill == {name: n for name, n in wanted.items() if n}
    steps = len(TURNS) * (GENERATED - 1)
    assert decode.keys() == {"decode bf16"} and steps <= decode["decode bf16"] <= steps + len(TURNS)


def test_four_turns_with_prefix_caches(pair: Played, servers: Servers) -> None:
    """Each server of the pair reuses what it has of the conversation, the prefill server its prompts, the decode server
    (which is who answers) all but the last token that it generated too; the first turn is one server's."""
    pair.flush()
    servers.low.flush()
    rng = random.Random(32)
    prompt, low, had = ids(rng, 300), pair.states()[0]["precision"]["prefill"], 0
    for turn, new in enumerate(TURNS):
        before = pair.states()
        ours = pair.generate(prompt, GENERATED, return_logprob=True)
        if turn == 0:
            theirs = servers.low.generate(prompt, GENERATED, return_logprob=True)
            assert outputs([ours])[0][:2] == outputs([theirs])[0][:2]
        time.sleep(0.5)
        prefill, decode = counted(before, pair.states())
        assert prefill == {f"prefill {low}": len(prompt) - had - 1, "prefill bf16": 1, "protected": 1}
        assert decode.keys() == {"decode bf16"}
        cached = ours["meta_info"]["cached_tokens"]
        assert cached == 0 if turn == 0 else had < cached <= had + GENERATED
        had = len(prompt)
        prompt = [*prompt, *ours["output_ids"], *ids(rng, new)]


def test_requests_may_ask_for_bf16_and_bad_policies_are_refused(pair: Played) -> None:
    prompt = ids(random.Random(33), 150)
    usual = pair.generate(prompt, 4)
    before = pair.states()
    mine = pair.generate(prompt, 4, sampling=BF16_POLICY)
    again = pair.generate(prompt, 4, sampling=BF16_POLICY)
    time.sleep(0.5)
    prefill, _ = counted(before, pair.states())
    assert [a["meta_info"]["cached_tokens"] for a in (usual, mine)] == [0, 0]
    assert again["meta_info"]["cached_tokens"] >= 149
    assert prefill == {"prefill bf16": 151, "protected": 151}
    body = {"input_ids": prompt, "sampling_params": {"custom_params": {"mixquant": {"prefill": "fp4"}}}}
    answer = pair.post("/generate", body)
    assert 400 <= answer.status_code < 600 and "allowed: {'prefill': 'bf16'}" in answer.text
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
    answer = pair.post("/v1/chat/completions", chat)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_several_samples_are_refused_and_not_waited_for(pair: Played, stream: bool) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for path, prompt in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", chat)):
        body = {"model": "m", "max_tokens": 4, "stream": stream, **prompt}
        answer = pair.post(path, {**body, "n": 2})
        assert stream or answer.status_code == 400
        assert "n is 2; allowed on a prefill/decode pair: 1" in answer.text
        assert pair.post(path, {**body, "n": 1}).status_code == 200


def test_what_minilb_has_no_route_for(pair: Played) -> None:
    for path in ("/v1/messages", "/v1/responses", "/v1/embeddings"):
        assert pair.post(path, {"model": "m", "input": "hi"}).status_code == 404
    assert requests.get(pair.url + "/metrics", timeout=60).status_code == 404


def test_metrics_of_both_say_the_split(pair: Played) -> None:
    for name, state in zip(("prefill", "decode"), pair.states(), strict=True):
        text = requests.get(pair.plan.url(name) + "/metrics", timeout=60).text
        lines = [line for line in text.splitlines() if line.startswith("mixquant:forward_tokens_total")]
        counts = {(phase, p): n for phase, by in state["tokens"].items() for p, n in by.items() if n}
        for (phase, precision), n in counts.items():
            found = [line for line in lines if f'phase="{phase}"' in line and f'precision="{precision}"' in line]
            assert len(found) == 1 and float(found[0].rsplit(" ", 1)[1]) == n
        assert {phase for phase, _ in counts} == {name}


# -- generated tokens that are prefilled again ---


def test_generated_tokens_stay_protected_when_a_weight_update_has_them_prefilled_again(
    pair: Played, tiny_model: Path
) -> None:
    pair.flush()
    prompt, tokens = ids(random.Random(34), 140), 300
    answers: list[requests.Response] = []
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "rid": "retracted"}
    request = threading.Thread(target=lambda: answers.append(pair.post("/generate", body)))
    before = pair.states()
    request.start()
    deadline = time.monotonic() + 120
    while pair.states()[1]["tokens"]["decode"]["bf16"] < before[1]["tokens"]["decode"]["bf16"] + 20:
        assert time.monotonic() < deadline and request.is_alive()
        time.sleep(0.05)
    assert pair.of("decode", "/pause_generation", {"mode": "retract"}).status_code == 200
    marked, paused = len(pair.batches("prefill")), pair.states()
    for name in ("prefill", "decode"):
        done = pair.of(name, "/update_weights_from_disk", {"model_path": str(tiny_model), "flush_cache": True})
        assert done.json()["success"], done.text
    assert pair.of("decode", "/continue_generation", {}).status_code == 200
    request.join(timeout=300)
    answer = answers[0]
    assert answer.status_code == 200, answer.text
    assert answer.json()["meta_info"]["completion_tokens"] == tokens
    time.sleep(0.5)
    again = [r for b in pair.batches("prefill")[marked:] for r in b["requests"] if r["rid"] == "retracted"]
    rows = sum(r["new"] for r in again)
    generated = rows - len(prompt)
    assert generated >= 19 and again[0]["prefix"] == 0, (
        "it was prefilled again from the start, with what it had generated"
    )
    prefill, decode = counted(paused, pair.states())
    low = paused[0]["precision"]["prefill"]
    # the last prompt token and all that was generated
    assert prefill == {
        f"prefill {low}": rows - generated - 1,
        "prefill bf16": generated + 1,
        "protected": generated + 1,
    }
    assert decode.keys() == {"decode bf16"}


# -- pairs that do not fit ---


class Registry:
    """A prefill server's registry that says something else of what it is: ``told``, or nothing where that is None."""

    def __init__(self, real: str) -> None:
        self.told: dict[str, str] | None = None
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/mixquant":
                    found = None if registry.told is None else json.dumps(registry.told).encode()
                    status = 404 if found is None else 200
                else:
                    answer = requests.get(real + self.path, timeout=30)
                    status, found = answer.status_code, answer.content
                self.answer(status, found or b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = requests.post(
                    real + self.path, data=body, headers={"Content-Type": "application/json"}, timeout=30
                )
                self.answer(answer.status_code, answer.content)

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (None, "runs without mixquant"),
        ({"asked": "0" * 16, "recipe": "other"}, "the prefill server other"),
        ({"model": "0" * 16}, "other layers"),
        ({"fingerprint": "0" * 16}, "one kind of GPU"),
    ],
    ids=["stock", "recipe", "model", "kept"],
)
def test_a_prefill_server_that_does_not_fit_is_refused_and_the_next_request_served(
    pair: Played, changes: dict[str, str] | None, why: str
) -> None:
    real = f"http://127.0.0.1:{pair.plan.port_of('bootstrap')}"
    registry = Registry(real)
    if changes is not None:
        registry.told = {**requests.get(real + "/mixquant", timeout=30).json(), **changes}
    try:
        room = {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": registry.port,
            "bootstrap_room": random.getrandbits(62),
        }
        body = {"input_ids": [7] * 20, "sampling_params": {"max_new_tokens": 4, "temperature": 0}, **room}
        answers: dict[str, requests.Response] = {}

        def send(name: str) -> None:
            answers[name] = pair.of(name, "/generate", body)

        threads = [threading.Thread(target=send, args=(name,)) for name in ("prefill", "decode")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert answers["decode"].status_code == 500 and why in answers["decode"].text, answers["decode"].text
        assert "mixquant: " in answers["decode"].text
        assert answers["prefill"].status_code != 200, "the prefill server is told, and does not wait in vain"
    finally:
        registry.close()
    assert pair.generate([7] * 20, 4)["meta_info"]["completion_tokens"] == 4


# -- one half dies ---


def in_flight(pair: Played, prompt: list[int], tokens: int) -> tuple[threading.Thread, list[tuple[int, str]]]:
    """A request on its way; its status (0 for none) and text once it has ended."""
    ended: list[tuple[int, str]] = []

    def send() -> None:
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        try:
            answer = pair.post("/generate", {"input_ids": prompt, "sampling_params": params}, timeout=200)
            ended.append((answer.status_code, answer.text))
        except requests.RequestException as error:
            ended.append((0, str(error)))

    thread = threading.Thread(target=send)
    thread.start()
    return thread, ended


def served_again(pair: Played) -> None:
    """The router notices a server that is back by itself, in some seconds."""
    deadline = time.monotonic() + 120
    params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    while True:
        answer = pair.post("/generate", {"input_ids": [9] * 30, "sampling_params": params})
        if answer.status_code == 200:
            assert answer.json()["meta_info"]["completion_tokens"] == 4
            return
        assert time.monotonic() < deadline, answer.text
        time.sleep(1)


def test_the_prefill_server_dies_and_comes_back(pair: Played) -> None:
    """The decode server, which lives on, asks what it is once more, and both count on."""
    thread, ended = in_flight(pair, ids(random.Random(42), 6000), 4)
    marked, asked = len(pair.batches("prefill")), fits(pair)
    while len(pair.batches("prefill")) < marked + 2:
        assert thread.is_alive()
        time.sleep(0.05)
    pair.processes["prefill"].signal(signal.SIGKILL)
    thread.join(timeout=200)
    assert ended and ended[0][0] != 200, ended
    assert requests.get(pair.plan.url("decode") + "/health", timeout=60).status_code == 200
    pair.processes["prefill"].kill()
    pair.start("prefill")
    pair.wait("prefill")
    served_again(pair)
    assert fits(pair) > asked, "asked anew in its second life"
    before = pair.states()
    pair.generate(ids(random.Random(43), 200), 4)
    time.sleep(0.5)
    prefill, decode = counted(before, pair.states())
    assert prefill == {f"prefill {before[0]['precision']['prefill']}": 199, "prefill bf16": 1, "protected": 1}
    assert decode.keys() == {"decode bf16"} and 3 <= decode["decode bf16"] <= 4


def test_the_decode_server_dies_and_a_stock_one_takes_its_place(pair: Played, tiny_model: Path) -> None:
    thread, ended = in_flight(pair, ids(random.Random(40), 50), 4000)
    decoded = pair.states()[1]["tokens"]["decode"]["bf16"]
    while pair.states()[1]["tokens"]["decode"]["bf16"] < decoded + 5:
        assert thread.is_alive()
        time.sleep(0.05)
    pair.processes["decode"].signal(signal.SIGKILL)
    thread.join(timeout=200)
    assert ended and ended[0][0] != 200, ended
    assert requests.get(pair.plan.url("prefill") + "/health", timeout=60).status_code == 200
    shim = plugins.write(pair.logs, "cpu_shim", plugins.CPU_SHIM)
    stock = {**pair.plan.envs["decode"], "SGLANG_PLUGINS": "cpu_shim", "PYTHONPATH": plugins.on_path([shim])}
    pair.plan = replace(pair.plan, decode="stock", envs={**pair.plan.envs, "decode": stock})
    pair.processes["decode"].kill()
    pair.start("decode")
    pair.wait("decode")
    served_again(pair)
    assert pair.states()[1] == {}
    before = pair.states()[0]
    pair.generate(ids(random.Random(41), 200), 4)
    low = before["precision"]["prefill"]
    prefill = counted([before], [pair.states()[0]])[0]
    assert prefill == {f"prefill {low}": 199, "prefill bf16": 1, "protected": 1}
