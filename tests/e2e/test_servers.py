"""The promises, on real servers: stock SGLang, recipe bf16 and low-precision prefill, side by side.

Three servers are started once: ``stock`` (no plugin loaded), ``control`` (recipe bf16) and ``low`` (recipe auto; small
chunks, mixed batches, and a spy plugin that writes down what SGLang puts into each batch); on a GPU also SGLang's own
FP8 server, to compare rounding with.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.torch import load_file, save_file

from mixquant_sglang.recipe.modules import TIED
from tests.support.server import ON_GPU, Server
from tests.support.servers import CHUNK, LOW_RECIPE, Servers

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]

BF16_POLICY = {"custom_params": {"mixquant": {"prefill": "bf16"}}}


def ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(10, 2000) for _ in range(n)]


def conversation(server: Server, seed: int, **more: Any) -> list[dict[str, Any]]:
    """Five turns that grow one prompt, greedy, with the logprobs of every generated token."""
    rng = random.Random(seed)
    prompt, turns = ids(rng, 300), []
    for length in (200, 7, 130, 61, 0):
        answer = server.generate(prompt, 24, return_logprob=True, **more)
        turns.append(answer)
        prompt = [*prompt, *answer["output_ids"], *ids(rng, length)]
    return turns


def outputs(turns: list[dict[str, Any]]) -> list[tuple[list[int], list[float], int]]:
    return [
        (
            turn["output_ids"],
            [entry[0] for entry in turn["meta_info"]["output_token_logprobs"]],
            turn["meta_info"]["cached_tokens"],
        )
        for turn in turns
    ]


# -- identity ---


def test_recipe_bf16_equals_stock_sglang_to_the_last_bit(servers: Servers) -> None:
    """Tokens, logprobs and cache hits of greedy multi-turn runs."""
    for seed in (1, 2):
        stock = outputs(conversation(servers.stock, seed))
        assert outputs(conversation(servers.control, seed)) == stock
        assert all(cached > 0 for _, _, cached in stock[1:])
        assert len({token for tokens, _, _ in stock for token in tokens}) > 8, "a model that repeats one token"


def test_decode_equals_stock_sglang_to_the_last_bit_given_the_same_kv(servers: Servers) -> None:
    """The low server, told to prefill in BF16, holds stock's KV; then its decode steps must be stock's."""
    for seed in (3, 4):
        # Whole chunks, so that a captured prefill graph (stock) and an eager pass (low) have equal GEMM shapes.
        prompt = ids(random.Random(seed), 2 * CHUNK)
        stock = servers.stock.generate(prompt, 32, return_logprob=True)
        low = servers.low.generate(prompt, 32, return_logprob=True, sampling=BF16_POLICY)
        assert outputs([low])[0][:2] == outputs([stock])[0][:2]


def test_low_precision_prefill_is_really_another_computation(servers: Servers) -> None:
    prompt = ids(random.Random(5), 300)
    stock, low = (outputs([s.generate(prompt, 8, return_logprob=True)])[0] for s in (servers.stock, servers.low))
    assert stock[1] != low[1]


# -- the split ---


class Counted:
    """What the low server says it ran during the block, what SGLang put into its batches, and what the API said."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers

    def __enter__(self) -> Counted:
        self._batches, self._state = len(self.servers.batches()), self.servers.low.state()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.5)  # a pass that overlaps with the answer of the last one
        before, after = self._state, self.servers.low.state()
        self.batches = self.servers.batches()[self._batches :]

        def grown(phase: str, precision: str) -> int:
            return after["tokens"][phase].get(precision, 0) - before["tokens"][phase].get(precision, 0)

        low = after["precision"]["prefill"]
        self.low, self.high = grown("prefill", low), grown("prefill", "bf16")
        self.decode, self.decode_low = grown("decode", "bf16"), grown("decode", low)
        self.protected = after["protected_rows"] - before["protected_rows"]
        self.passes = {phase: after["passes"][phase] - before["passes"][phase] for phase in after["passes"]}

    def check(self, *, bf16_rids: frozenset[str] = frozenset()) -> None:
        """The counters against a count, position by position, of what SGLang put into its batches."""
        low = high = decode = mixed_decode = 0
        for batch in self.batches:
            for request in batch["requests"]:
                if request["decoding"]:
                    decode += 1
                    mixed_decode += batch["mode"] == "MIXED"
                    continue
                for position in range(request["prefix"], request["prefix"] + request["new"]):
                    keep = position >= request["prompt"] - 1 or request["rid"] in bf16_rids
                    low, high = low + (not keep), high + keep
        assert (self.low, self.high, self.decode, self.decode_low) == (low, high, decode, 0)
        assert self.protected == high + mixed_decode
        prefills = sum(batch["mode"] != "DECODE" for batch in self.batches)
        assert self.passes == {"prefill": prefills, "decode": len(self.batches) - prefills}

    def check_against_api(self, answers: list[dict[str, Any]]) -> None:
        """The counters against what the clients were told, for requests that were neither retracted nor aborted."""
        meta = [answer["meta_info"] for answer in answers]
        assert self.low + self.high == sum(m["prompt_tokens"] - m["cached_tokens"] for m in meta)
        assert self.high == len(answers)  # one last prompt token each
        steps = sum(m["completion_tokens"] for m in meta)
        # The first token comes from the prefill; overlap scheduling runs one more step before it sees the end.
        assert steps - len(answers) <= self.decode <= steps


def together(calls: list[Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_split_of_chunked_prompts(servers: Servers) -> None:
    rng = random.Random(10)
    with Counted(servers) as counted:
        answers = [servers.low.generate(ids(rng, n), 4) for n in (300, CHUNK, CHUNK + 1, 5)]
    counted.check()
    counted.check_against_api(answers)
    assert counted.passes["prefill"] == 3 + 1 + 2 + 1


def test_split_of_mixed_batches(servers: Servers) -> None:
    rng = random.Random(11)
    low = servers.low
    with Counted(servers) as counted:
        calls = [partial(low.generate, ids(rng, n), t) for n, t in ((40, 60), (30, 50), (700, 5), (650, 6))]
        answers = together(calls)
    counted.check()
    counted.check_against_api(answers)
    assert any(b["mode"] == "MIXED" and any(r["decoding"] for r in b["requests"]) for b in counted.batches)


def test_split_of_cached_prompts_and_a_full_hit(servers: Servers) -> None:
    rng = random.Random(12)
    prompt = ids(rng, 200)
    with Counted(servers) as counted:
        answers = [servers.low.generate(p, 4) for p in (prompt, [*prompt, *ids(rng, 90)], prompt)]
    counted.check()
    counted.check_against_api(answers)
    assert [a["meta_info"]["cached_tokens"] for a in answers] == [0, 200, 199]


def test_split_of_an_aborted_request(servers: Servers) -> None:
    low, rid = servers.low, "to-be-aborted"
    prompt = ids(random.Random(13), 300)
    with Counted(servers) as counted:

        def long_request() -> Any:
            params = {"max_new_tokens": 4000, "ignore_eos": True}
            return low.post("/generate", {"input_ids": prompt, "rid": rid, "sampling_params": params}, ok=False)

        def abort() -> None:
            time.sleep(1.5)
            requests.post(low.url + "/abort_request", json={"rid": rid}, timeout=60)

        answer = together([long_request, abort])[0]
        time.sleep(1)
    counted.check()
    assert counted.low + counted.high == 300 and counted.high == 1
    assert 1 < counted.decode < 4000 and "abort" in answer.text


def test_a_request_can_ask_for_bf16_prefill_and_gets_its_own_cache_namespace(servers: Servers) -> None:
    prompt = ids(random.Random(14), 250)
    low = servers.low
    first = low.generate(prompt, 4)
    with Counted(servers) as counted:
        mine = low.generate(prompt, 4, rid="mine", sampling=BF16_POLICY)
        again = low.generate(prompt, 4, rid="again", sampling=BF16_POLICY)
    counted.check(bf16_rids=frozenset({"mine", "again"}))
    assert counted.low == 0 and counted.high == 251
    assert [a["meta_info"]["cached_tokens"] for a in (first, mine, again)] == [0, 0, 249]


def test_policies_in_one_batch(servers: Servers) -> None:
    rng = random.Random(15)
    low = servers.low
    with Counted(servers) as counted:
        prompts = [ids(rng, n) for n in (60, 300, 45, 50)]
        together(
            [partial(low.generate, prompts[0], 30), partial(low.generate, prompts[1], 3, rid="b", sampling=BF16_POLICY)]
            + [partial(low.generate, prompt, 20) for prompt in prompts[2:]]
        )
    counted.check(bf16_rids=frozenset({"b"}))


# -- rows are independent ---


def test_a_prompts_logits_alone_and_in_company(servers: Servers) -> None:
    """Codes and scales do not move (tests/kernels); what moves logits is how the GEMM library sums for another number
    of rows.  Hence the controls: stock BF16, and on a GPU SGLang's own FP8, whose GEMM the low server uses."""
    controls = [servers.stock] if servers.stock_fp8 is None else [servers.stock, servers.stock_fp8]
    moved: dict[str, list[float]] = {}
    for server in [*controls, servers.low]:
        rng = random.Random(16)
        for _ in range(8):
            prompt, company = ids(rng, 40), [ids(rng, 40) for _ in range(2)]
            server.flush()
            alone = server.generate(prompt, 1, return_logprob=True, top_logprobs_num=20)
            server.flush()
            batch = server.generate([prompt, *company], 1, return_logprob=True, top_logprobs_num=20)[0]
            before, after = (
                {token: value for value, token, _ in answer["meta_info"]["output_top_logprobs"][0]}
                for answer in (alone, batch)
            )
            shared = before.keys() & after.keys()
            assert len(shared) >= 10
            moved.setdefault(server.log.stem, []).append(max(abs(before[token] - after[token]) for token in shared))
    mean = {name: sum(values) / len(values) for name, values in moved.items()}
    print("logprobs move by, mean of the largest of 8 prompts:", {name: f"{value:.2e}" for name, value in mean.items()})
    assert mean.pop("low") <= 1.5 * max(mean.values())


# -- the last layer ---


def test_input_logprobs_read_every_row(servers: Servers) -> None:
    """The last layer leaves out rows that nobody reads; whoever asks for input logprobs reads them all."""
    prompt = ids(random.Random(19), 300)
    wanted: dict[str, list[float]] = {}
    for name, server in (("control", servers.control), ("low", servers.low)):
        server.flush()
        answer = server.generate(prompt, 4, return_logprob=True, logprob_start_len=0)
        wanted[name] = [value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]]
        server.flush()
        usual = server.generate(prompt, 4, return_logprob=True)
        # The same rows in another GEMM shape: BF16 rounding, far below what another precision would move.
        assert answer["output_ids"][0] == usual["output_ids"][0]
        assert abs(outputs([answer])[0][1][0] - outputs([usual])[0][1][0]) < 0.1
    moved = [abs(low - control) for low, control in zip(wanted["low"], wanted["control"], strict=True)]
    shuffled = [abs(low - control) for low, control in zip(wanted["low"], wanted["control"][::-1], strict=True)]
    print(f"input logprobs: {len(moved)}, moved by {sum(moved) / 299:.3f}; of other rows by {sum(shuffled) / 299:.3f}")
    assert len(moved) == 299 and 0 < sum(moved) < 0.5 * sum(shuffled)


# -- requests and surface ---


@pytest.mark.parametrize("policy", [3, None, {"prefill": "fp4"}, {"prefil": "bf16"}, {"prefill": "y" * 200_000}])
def test_a_bad_policy_is_a_short_400_and_the_server_goes_on(servers: Servers, policy: Any) -> None:
    custom = {"custom_params": {"mixquant": policy}}
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, **custom}}
    answer = servers.low.post("/generate", body, ok=False)
    assert answer.status_code == 400 and "allowed: {'prefill': 'bf16'}" in answer.text and len(answer.text) < 600
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **custom}
    answer = servers.low.post("/v1/chat/completions", chat, ok=False)
    assert answer.status_code == 400 and "allowed: {'prefill': 'bf16'}" in answer.text and len(answer.text) < 600
    assert servers.low.post("/v1/chat/completions", {**chat, "custom_params": None})["choices"]


def prompts(text: str) -> dict[str, dict[str, Any]]:
    """A short answer to ``text`` on each entry point that generates with this model, by path."""
    messages = [{"role": "user", "content": text}]
    return {
        "/generate": {"text": text, "sampling_params": {"max_new_tokens": 2}},
        "/vertex_generate": {"instances": [{"text": text}], "parameters": {"sampling_params": {"max_new_tokens": 2}}},
        "/v1/completions": {"prompt": text, "max_tokens": 2},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 2},
        "/invocations": {"messages": messages, "max_tokens": 2},
        "/v1/responses": {"input": text, "max_output_tokens": 2},
        "/v1/messages": {"messages": messages, "max_tokens": 2},
        "/api/generate": {"prompt": text, "stream": False, "options": {"num_predict": 2}},
        "/v1/score": {"query": text, "items": [" yes", " no"], "label_token_ids": [5, 6]},
    }


@pytest.mark.parametrize("path", prompts(""))
def test_every_entry_point_honours_a_policy_or_answers_400(servers: Servers, path: str) -> None:
    low = servers.low
    served = requests.get(low.url + "/v1/models", timeout=60).json()["data"][0]["id"]
    body = {**prompts(f"{path} counts the wolves " * 5)[path], "model": served}
    shapes = [body, {**body, "stream": True}] if path not in ("/v1/score", "/vertex_generate") else [body]
    for asked in shapes:
        low.flush()
        with Counted(servers) as counted:
            answer = low.post(path, {**asked, **BF16_POLICY}, ok=False)
        assert answer.status_code == 200, answer.text
        assert counted.low == 0 and counted.high > 20
        for wrong in ({"mixquant": {"prefill": "nonsense"}}, {"mixquant": None}, ["mixquant"], "mixquant", 7):
            answer = low.post(path, {**asked, "custom_params": wrong}, ok=False)
            assert answer.status_code == 400 and "allowed: " in answer.text, answer.text
    low.flush()
    with Counted(servers) as counted:
        assert low.post(path, body)
    assert counted.low > 20 and counted.high <= 2


def test_one_policy_a_prompt_in_a_batch(servers: Servers) -> None:
    low, rng = servers.low, random.Random(30)
    body = {"input_ids": [ids(rng, 40), ids(rng, 50)], "sampling_params": [{"max_new_tokens": 2}] * 2}
    with Counted(servers) as counted:
        low.post(
            "/generate", {**body, "sampling_params": [{"max_new_tokens": 2, **BF16_POLICY}, {"max_new_tokens": 2}]}
        )
    assert (counted.low, counted.high) == (49, 41)
    wrong = [{"max_new_tokens": 2}, {"max_new_tokens": 2, "custom_params": {"mixquant": 1}}]
    assert low.post("/generate", {**body, "sampling_params": wrong}, ok=False).status_code == 400


@pytest.mark.parametrize("field", ["extra_key", "cache_salt"])
def test_no_client_text_reaches_another_policys_cache(servers: Servers, field: str) -> None:
    low, rng = servers.low, random.Random(31)
    made_by = low.state()["fingerprint"]
    prompt = ids(rng, 120)
    low.flush()
    clean = low.generate(prompt, 4, return_logprob=True, sampling=BF16_POLICY)
    for text in ("|mixquant=bf16", "mixquant:bf16", "|mixquant:bf16", "mixquant:bf16|", f"mixquant:{made_by}", ""):
        low.flush()
        body = {"model": "m", "prompt": prompt, "max_tokens": 1, field: text}
        low.post("/v1/completions", body)
        low.generate(prompt, 1, extra_key=text)
        low.generate([prompt, prompt[:50]], 1, extra_key=[text, "other"])
        mine = low.generate(prompt, 4, return_logprob=True, sampling=BF16_POLICY)
        assert mine["meta_info"]["cached_tokens"] == 0 and outputs([mine]) == outputs([clean])
        again = low.post("/v1/completions", body)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 119, "a client's own key still finds its KV"


def test_a_streaming_session_keeps_to_one_policy(servers: Servers) -> None:
    low, rng = servers.low, random.Random(32)

    def turn(session: str, n: int, **sampling: Any) -> requests.Response:
        params = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True, **sampling}
        body = {"input_ids": ids(rng, n), "session_params": {"id": session}, "sampling_params": params}
        answer: requests.Response = low.post("/generate", body, ok=False)
        return answer

    for first, second in (({}, BF16_POLICY), (BF16_POLICY, {})):
        session = low.post("/open_session", {"capacity_of_str_len": 5000, "streaming": True})
        one = turn(session, 150, **first).json()["meta_info"]
        assert one["cached_tokens"] == 0
        refused = turn(session, 20, **second)
        assert refused.status_code == 400 and "streaming session keeps KV of turns prefilled in" in refused.text
        with Counted(servers) as counted:
            two = turn(session, 20, **first).json()["meta_info"]
        assert two["prompt_tokens"] == 150 + 4 + 20, "the refused turn left nothing behind"
        assert two["cached_tokens"] >= 150 and (counted.low == 0) == bool(first)
        requests.post(low.url + "/close_session", json={"session_id": session}, timeout=60)
    # Other sessions are requests like any other: their KV lies in the radix tree, under the turn's own name.
    session = low.post("/open_session", {"capacity_of_str_len": 5000})
    one = low.post(
        "/generate",
        {"input_ids": ids(rng, 90), "session_params": {"id": session}, "sampling_params": {"max_new_tokens": 2}},
    )
    body = {"input_ids": ids(rng, 10), "session_params": {"id": session, "rid": one["meta_info"]["id"]}}
    two = low.post("/generate", {**body, "sampling_params": {"max_new_tokens": 2, **BF16_POLICY}})["meta_info"]
    assert two["prompt_tokens"] > 100 and two["cached_tokens"] == 0
    requests.post(low.url + "/close_session", json={"session_id": session}, timeout=60)


def test_sglang_frontend(servers: Servers) -> None:
    import sglang

    @sglang.function
    def two_turns(s: Any) -> None:
        s += "Look this up: " + "lorem ipsum " * 60 + sglang.gen("first", max_tokens=8, temperature=0)
        s += "\nAnd now: " + sglang.gen("second", max_tokens=8, temperature=0)

    with Counted(servers) as counted:
        said = two_turns.run(backend=sglang.RuntimeEndpoint(servers.low.url))
        assert said["first"] and said["second"]
    counted.check()
    assert counted.low > 60 and counted.high >= 2


def test_server_info(servers: Servers) -> None:
    state = servers.low.state()
    low = state["precision"]["prefill"]
    assert state["recipe"] == LOW_RECIPE and state["precision"] == {"prefill": low, "decode": "bf16"}
    layers = {low: 32} if (LOW_RECIPE, low) != ("auto", "nvfp4+fp8") else {"nvfp4": 8, "fp8": 24}
    assert state["layers"] == layers and state["kernel"].keys() == layers.keys()
    assert len(state["fingerprint"]) == 16 and servers.control.state()["fingerprint"] == "bf16"
    assert state["experts"] == {} and "unproven" not in state
    assert state["stays_bf16"] == {TIED: "model.embed_tokens"}
    assert 0.25 * 19.3e6 < state["extra_weight_bytes"] < 0.55 * 19.3e6
    control = servers.control.state()
    assert control["kernel"] == {} and control["extra_weight_bytes"] == control["protected_rows"] == 0
    assert control["precision"] == {"prefill": "bf16", "decode": "bf16"}
    assert control["stays_bf16"].keys() == {"by the recipe", TIED} and control["stays_bf16"]["by the recipe"].endswith(
        "28 more"
    )
    assert control["layers"] == {"bf16": 32} and control["tokens"]["prefill"].keys() == {"bf16"}
    info = requests.get(servers.stock.url + "/server_info", timeout=60).json()
    assert "mixquant" not in info["internal_states"][0]


def test_metrics_say_what_server_info_says(servers: Servers) -> None:
    text = requests.get(servers.low.url + "/metrics", timeout=60).text
    state = servers.low.state()
    for phase, by_precision in state["tokens"].items():
        for precision, n in by_precision.items():
            lines = [line for line in text.splitlines() if line.startswith("mixquant:forward_tokens_total")]
            found = [line for line in lines if f'phase="{phase}"' in line and f'precision="{precision}"' in line]
            assert len(found) == 1 and float(found[0].rsplit(" ", 1)[1]) == n and 'tp_rank="0"' in found[0]
    for name in ("forward_passes_total", "protected_rows_total", "layers", "extra_weight_bytes", "info"):
        assert f"mixquant:{name}{{" in text
    assert "mixquant:" not in requests.get(servers.control.url + "/metrics", timeout=60).text


def test_log_lines(servers: Servers) -> None:
    text = servers.low.log.read_text()
    low = servers.low.state()["precision"]["prefill"]
    assert text.count(f": recipe {LOW_RECIPE} -> prefill ") == 1
    assert "mixquant: fused in prefill: " in text and "unread rows left out behind the last layer's attention" in text
    assert "mixquant: linears by prefill precision: " in text
    assert "mixquant: a tiny prompt ran 32 of 32 low linears (passes: 12 rows, " in text
    assert f"#{low}-token: " in text and "#protected-row: 1, " in text
    assert "is not fully optimized" not in text
    stock = servers.stock.log.read_text()
    assert "mixquant" not in stock.replace("SGLANG_PLUGINS", "") or "Skipping plugin mixquant" in stock


def test_weight_update_packs_again(servers: Servers, tiny_model: Path) -> None:
    """Reloading the same checkpoint changes nothing; the packed weights are refreshed in place."""
    low = servers.low
    prompt = ids(random.Random(17), 100)
    low.flush()
    before = low.generate(prompt, 8, return_logprob=True)
    answer = low.post("/update_weights_from_disk", {"model_path": str(tiny_model)})
    assert answer["success"], answer
    low.flush()
    after = low.generate(prompt, 8, return_logprob=True)
    assert outputs([before]) == outputs([after])


@pytest.mark.parametrize("how", ["nan", "shape", "missing"])
def test_a_broken_weight_update_is_refused(servers: Servers, tiny_model: Path, tmp_path: Path, how: str) -> None:
    """Where stock SGLang serves the NaN, and ends with the other two."""
    low, name, prompt = servers.low, "model.layers.2.mlp.down_proj.weight", ids(random.Random(17), 100)
    low.flush()
    before = low.generate(prompt, 8, return_logprob=True)
    broken = Path(shutil.copytree(tiny_model, tmp_path / how))
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            if how == "nan":
                tensors[name][5, 7] = float("nan")
            else:
                tensors |= {name: tensors[name][:-1].contiguous()} if how == "shape" else {}
                _ = tensors.pop(name) if how == "missing" else None
            save_file(tensors, file, metadata={"format": "pt"})
    answer = low.post("/update_weights_from_disk", {"model_path": str(broken)}, ok=False).json()
    assert not answer["success"] and f"{broken}: {name} " in answer["message"], answer
    low.flush()
    after = low.generate(prompt, 8, return_logprob=True)
    assert outputs([before]) == outputs([after])
    assert requests.get(low.url + "/model_info", timeout=60).json()["model_path"] == str(tiny_model)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.gpu
def test_graphs_are_on(servers: Servers) -> None:
    servers.low.generate(ids(random.Random(18), CHUNK), 8)
    text = servers.low.log.read_text()
    assert "cuda graph: True" in text
