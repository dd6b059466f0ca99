"""Policies and names against SGLang's own requests, sessions, radix tree, page hashes and routes."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import random
import re
import subprocess
import sys
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import schedule_batch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.mem_cache import utils
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.session.session_controller import Session

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import refusals, runtime
from mixquant_sglang.host.hooks import http, launcher, requests
from mixquant_sglang.host.hooks.forward import prompt_tokens
from mixquant_sglang.host.runtime import Pair, Runtime
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.recipe import pairs
from mixquant_sglang.recipe.policy import PolicyError
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.versions import machine
from mixquant_sglang.versions.dialect import dialect
from mixquant_sglang.versions.requests import request_rows

BF16 = {"mixquant": {"prefill": "bf16"}}
CPU = Device("this CPU", None)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "requests.md"


def running(name: str = "nvfp4", **changes: Any) -> Runtime:
    asked = replace(recipe.load(name), **changes)
    return Runtime(asked, select(asked, CPU))


@pytest.fixture(autouse=True)
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """As in a scheduler of a server with the recipe nvfp4: the hook is on ``Req.__init__``."""
    run = running()
    monkeypatch.setattr(runtime, "_runtime", run)
    monkeypatch.setattr(launcher.asked, "recipe", run.recipe)
    monkeypatch.setattr(Req, "__init__", _wrap_fn(Req.__init__, requests.namespace_request, HookType.AFTER))
    monkeypatch.setattr(schedule_batch, "get_parallel", lambda: SimpleNamespace(tp_rank=1))
    yield run


def made(custom: Any = None, ids: tuple[int, ...] = (1, 2, 3, 4), **more: Any) -> Req:
    params = SamplingParams(max_new_tokens=4, custom_params=custom)
    return Req("rid", "", array("q", ids), params, vocab_size=4096, **more)


def salted(key: RadixKey) -> bool:
    return hasattr(key, "cache_salt")


def radix_key(req: Req) -> RadixKey:
    more = {"cache_salt": req.cache_salt} if hasattr(req, "cache_salt") else {}
    return RadixKey(req.origin_input_ids, req.extra_key, **more)


# -- names ---


def test_every_request_is_named_by_what_makes_its_kv(scheduler: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    low = f"mixquant:{scheduler.fingerprint}"
    assert made().extra_key == low and made(extra_key="mine").extra_key == f"{low}|mine"
    assert made(BF16).extra_key == "mixquant:bf16" and made(BF16, extra_key="").extra_key == "mixquant:bf16|"
    assert made(extra_key="mine", lora_id="a" * 32).extra_key == f"{low}|mine{'a' * 32}"  # kv events read the end
    for control in (running("bf16"), running("bf16", source="/elsewhere.yaml", min_tokens=7)):
        monkeypatch.setattr(runtime, "_runtime", control)
        assert made().extra_key == made(BF16).extra_key == "mixquant:bf16"


def client_keys(fingerprint: str) -> list[str | None]:
    rng = random.Random(1)
    parts = ["|", "mixquant", ":", "bf16", fingerprint, "=", "", "x", "|mixquant=bf16", "é"]
    texts = {"".join(rng.choice(parts) for _ in range(rng.randrange(6))) for _ in range(300)}
    return [None, "mixquant:bf16", "|mixquant=bf16", f"mixquant:{fingerprint}", *sorted(texts)]


def test_no_client_text_lets_a_bf16_request_match_low_kv(scheduler: Runtime) -> None:
    """And the other way round, in a real radix tree, while a client's own keys go on finding their own KV."""
    keys = client_keys(scheduler.fingerprint)
    rng = random.Random(2)
    for writer, reader in ((None, BF16), (BF16, None)):
        tree = RadixCache.create_simulated()
        for key in keys:
            salt = {"cache_salt": rng.choice(keys)} if salted(RadixKey(array("q", [1]))) else {}
            wrote = radix_key(made(writer, extra_key=key, **salt))
            tree.insert(InsertParams(key=wrote, value=torch.arange(4)))
            assert matched(tree, radix_key(made(writer, extra_key=key, **salt))) == 4
        for key in keys:
            for salt in keys[:6] if salted(RadixKey(array("q", [1]))) else [None]:
                more = {} if salt is None else {"cache_salt": salt}
                assert matched(tree, radix_key(made(reader, extra_key=key, **more))) == 0


def matched(tree: RadixCache, key: RadixKey) -> int:
    result = tree.match_prefix(MatchPrefixParams(key=key))
    indices = getattr(result, "device_indices", None)
    return len(indices) if indices is not None else result.device_prefix_len


@pytest.fixture
def hashes_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not SGLang's C++ of the same, compiled for minutes: a page's hash is of its tokens and the one before."""
    from sglang.srt.mem_cache.cpp_utils import native_hash

    def get_hash(raw: Any, length: int, _unit: int, _bigram: bool, prior: bytes | None, page: int) -> list[str]:
        names, digest = [], prior or b""
        for start in range(0, length, page):
            digest = hashlib.sha256(digest + bytes(array("q", raw[start : start + page]))).digest()
            names.append(digest.hex())
        return names

    monkeypatch.setattr(native_hash, "_load_native_hash_module", lambda: SimpleNamespace(get_hash=get_hash))


def pages(req: Req) -> list[str]:
    """The names of the request's pages of two tokens in a store."""
    name = getattr(utils, "get_storage_hash_str", utils.get_hash_str)  # 0.5.23, 0.5.17
    return list(name(radix_key(req), page_size=2))


@pytest.mark.usefixtures("hashes_in_python")
def test_stored_pages_of_other_recipes_have_other_names() -> None:
    """Where the version can: where all recipes share a page, ``stored_pages_are_named`` says so."""
    first = set()
    for asked in ("bf16", "fp8", "nvfp4", "nvfp4-fp8", "nvfp4-everywhere"):
        runtime.start(running(asked))
        for custom in (None, BF16) if asked == "nvfp4" else (None,):
            for client in (None, "mine"):
                assert pages(made(custom, extra_key=client)) == pages(made(custom, extra_key=client))
                first.add(pages(made(custom, extra_key=client))[0])
    if not dialect().stored_pages_are_named():
        assert len(first) == 1
        return
    assert len(first) == 2 * 5, "bf16 of nvfp4's server is that of the recipe bf16"
    stock = utils.get_storage_hash_str(RadixKey(array("q", [1, 2, 3, 4])), page_size=2)
    assert stock[0] not in first


def test_stores_that_name_pages_by_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    named = dialect().stored_pages_are_named()
    assert named == hasattr(utils, "storage_namespace_seed")
    attached = []
    answer = requests.attach_storage(lambda *args: attached.append(args) or "attached", None, "file")
    assert (answer == "attached") == named and bool(attached) == named
    if not named:
        assert not answer.success and "tokens alone" in answer.message
    for flag in ("hicache_storage_backend", "disaggregation_decode_enable_offload_kvcache"):
        for possible in (True, False):
            monkeypatch.setattr(dialect(), "stored_pages_are_named", lambda possible=possible: possible)
            args = SimpleNamespace(**{flag: "file"})
            if possible:
                refusals.check_server_args(args)
            else:
                with pytest.raises(MixQuantError, match=r"--.*: this SGLang names stored pages by their tokens alone"):
                    refusals.check_server_args(args)
    for flag in ("enable_lmcache", "enable_flexkv", "radix_cache_backend"):
        with pytest.raises(MixQuantError, match=flag.replace("_", "-")):
            refusals.check_server_args(SimpleNamespace(**{flag: True}))


def test_a_tree_that_looks_at_tokens_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.environ import envs

    known = hasattr(envs, "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE")
    monkeypatch.setenv("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", "1")
    assert dialect().tree_ignores_keys() == known
    refusals.check_server_args(SimpleNamespace(disable_radix_cache=True))
    if known:
        with pytest.raises(MixQuantError, match="SGLANG_EXPERIMENTAL_CPP_RADIX_TREE"):
            refusals.check_server_args(SimpleNamespace(disable_radix_cache=False))
    monkeypatch.delenv("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE")
    refusals.check_server_args(SimpleNamespace(disable_radix_cache=False))


def test_a_prompt_prefilled_again_elsewhere_is_named_there_once(scheduler: Runtime) -> None:
    for custom in (None, BF16):
        for key in (None, "", "mine", "mixquant:bf16"):
            payload = made(custom, extra_key=key).build_rebootstrap_payload()
            req = made(custom, extra_key=key)
            requests.rebootstrap_payload(payload, req)
            assert payload["extra_key"] == key
            prompt = {pairs.PROMPT: len(req.origin_input_ids)}
            assert payload["sampling_params"]["custom_params"] == {**prompt, **(custom or {})}
            again = made(payload["sampling_params"].get("custom_params"), extra_key=payload["extra_key"])
            assert again.extra_key == req.extra_key
            json.dumps(payload)


@pytest.mark.parametrize("mode", [pairs.PREFILL, pairs.DECODE, ""])
def test_a_prefill_server_is_told_where_the_prompt_ends(
    scheduler: Runtime, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server looks at no such thing: there generated tokens are behind ``origin_input_ids``."""
    monkeypatch.setattr(scheduler, "pair", Pair(mode, scheduler.recipe) if mode else None)
    sent = len(made(None).origin_input_ids)
    for told in (1, sent):
        req = made({pairs.PROMPT: told})
        assert req.to_finish is None and req.mixquant_prompt == (told if mode == pairs.PREFILL else None)
    assert made(None).mixquant_prompt is None
    for wrong in (0, sent + 1, True, "3", None, [1] * 500):
        req = made({pairs.PROMPT: wrong})
        assert (req.to_finish is not None) == (mode == pairs.PREFILL)
        if req.to_finish is not None:
            assert req.to_finish.status_code == 400 and f"allowed: 1 to {sent}" in req.to_finish.message
            assert len(req.to_finish.message) < 200


def test_rows_behind_the_prompt_that_a_prefill_server_was_told_of_are_protected(
    scheduler: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "pair", Pair(pairs.PREFILL, scheduler.recipe))
    req = made({pairs.PROMPT: 2})
    sent = len(req.origin_input_ids)
    batch = SimpleNamespace(reqs=[req], decoding_reqs=None)
    rows = SimpleNamespace(extend_seq_lens_cpu=[sent], extend_prefix_lens_cpu=[0])
    (found,) = request_rows(rows, batch, lambda r: r.mixquant_bf16, prompt_tokens)
    assert found == RequestRows(new=sent, prefix=0, prompt=2)
    scheduled = scheduler.schedule.prefill([found], torch.device("cpu"))
    assert scheduled.protected == ((1, sent),)


@pytest.mark.parametrize("mode", [pairs.PREFILL, pairs.DECODE, ""])
def test_several_samples_of_a_prompt_are_refused_on_a_pair(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang gives all of them the bootstrap room of one and never answers; a single server samples them."""
    monkeypatch.setenv(machine.DISAGGREGATION_ENV, mode)
    for n in (1, None, 2, 10**9):
        params = SamplingParams(n=n)
        params.normalize(None)
        if mode and n and n > 1:
            with pytest.raises(PolicyError, match=rf"^n is {n}; allowed on a prefill/decode pair: 1, .* a sample$"):
                requests.check_request(None, params)
        else:
            requests.check_request(None, params)


def test_sglang_still_gives_all_samples_of_a_prompt_one_room() -> None:
    """What the refusal rests on: each is a copy of the prompt's request, with another name."""
    source = inspect.getsource(TokenizerManager._handle_batch_request)
    assert source.count("copy.copy(tokenized_objs[i])") == 2 and "room" not in source


# -- the scheduler checks too ---


@pytest.mark.parametrize("custom", [{"mixquant": "y" * 5000}, {"mixquant": {"prefill": "fp4"}}, {"mixquant": None}])
def test_a_bad_policy_that_came_unverified_is_aborted(scheduler: Runtime, custom: Any) -> None:
    req = made(custom)
    assert req.to_finish.status_code == 400 and "allowed: {'prefill': 'bf16'}" in req.to_finish.message
    assert len(req.to_finish.message) < 200 and not req.mixquant_bf16
    assert req.extra_key == f"mixquant:{scheduler.fingerprint}"


def test_bf16_where_no_bf16_path_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_runtime", running("nvfp4-everywhere"))
    assert "has decode nvfp4" in made(BF16).to_finish.message and made().to_finish is None


def test_custom_params_that_sglang_adds_to(scheduler: Runtime) -> None:
    req = made({**BF16, "thinking_budget": 3}, custom_logit_processor="x")
    assert "__req__" in req.sampling_params.custom_params
    assert req.mixquant_bf16 and req.to_finish is None


# -- sessions ---


class Turn:
    """A tokenized request, as far as ``Session.create_req`` reads it: what it does not name is None."""

    def __init__(self, rid: str, custom: Any, ids: int, previous: str | None = None, **session: Any) -> None:
        self.rid, self.input_ids = rid, array("q", range(10, 10 + ids))
        self.sampling_params = SamplingParams(max_new_tokens=4, custom_params=custom)
        plain = {"id": "s", "rid": previous, "offset": None, "replace": None, "drop_previous_output": None}
        self.session_params = SimpleNamespace(**plain | session)
        self.extra_key, self.return_logprob, self.top_logprobs_num = "mine", False, 0
        self.return_sampling_mask = self.stream = self.return_hidden_states = False

    def __getattr__(self, name: str) -> None:
        return None


def turn(session: Session, *args: Any, **kwargs: Any) -> Req:
    req = session.create_req(Turn(*args, **kwargs), None, 4096)
    requests.session_turn(req, session)
    return req


def finish(session: Session, req: Req) -> None:
    req.output_ids = array("q", [7, 8])
    session.finish_req(req)


@pytest.mark.parametrize(("first", "second"), [(None, BF16), (BF16, None)])
def test_a_turn_does_not_reuse_a_streaming_sessions_kv_of_another_policy(first: Any, second: Any) -> None:
    session = Session(5000, "s", streaming=True)
    one = turn(session, "1", first, 20)
    assert one.to_finish is None
    finish(session, one)
    refused = turn(session, "2", second, 5)
    assert refused.to_finish.status_code == 400 and "keeps KV of turns prefilled in" in refused.to_finish.message
    session.abort_req()  # which the cache does for a request that is aborted before it runs
    two = turn(session, "3", first, 5)
    assert two.to_finish is None and len(two.origin_input_ids) == 20 + 2 + 5
    assert two.extra_key == one.extra_key


@pytest.mark.parametrize("how", [{}, {"offset": 10}, {"replace": True}, {"drop_previous_output": True}])
def test_turns_of_other_sessions_are_named_by_their_own_policy(scheduler: Runtime, how: dict[str, Any]) -> None:
    session = Session(5000, "s")
    one = turn(session, "1", None, 20)
    one.output_ids, one.finished_reason = array("q", [7, 8]), object()
    two = turn(session, "2", BF16, 5, previous="1", **how)
    assert two.to_finish is None and len(two.origin_input_ids) > 5
    assert (one.extra_key, two.extra_key) == (f"mixquant:{scheduler.fingerprint}|mine", "mixquant:bf16|mine")


# -- entry points ---


def verified(custom: Any = None) -> Any:
    params = SamplingParams(max_new_tokens=1, custom_params=custom)
    requests.check_request(None, params)
    return params.custom_params


def test_what_verify_refuses() -> None:
    assert verified() is None and verified({"a": 1}) == {"a": 1} and verified(BF16) == BF16
    for wrong in ({"mixquant": None}, [BF16], "mixquant", 5):
        with pytest.raises(PolicyError, match="allowed: "):
            verified(wrong)


async def ask(
    body: bytes, *, chunks: int = 1, method: str = "POST", path: str = "/v1/messages", root_path: str = ""
) -> tuple[int, Any]:
    """What PolicyLayer in front of an endpoint answers; the endpoint gives what ``verify`` hands on, from a task."""
    size = -(-len(body) // chunks) or 1
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages: list[Any] = [{"type": "http.request", "body": p, "more_body": p is not parts[-1]} for p in parts]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        got = [await receive() for _ in parts]
        assert b"".join(message["body"] for message in got) == body
        assert (await receive())["type"] == "http.disconnect"

        async def later() -> Any:
            return verified()

        answer = json.dumps(await asyncio.create_task(later())).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    headers = [(b"Content-Type", b"application/json")]
    await http.PolicyLayer(endpoint)(
        {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": headers}, receive, send
    )
    assert not http.asked_bf16()
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_the_layer_hands_on_policies_and_bodies() -> None:
    body = json.dumps({"messages": ["x" * 1000], "custom_params": BF16}).encode()
    for chunks in (1, 3):
        assert asyncio.run(ask(body, chunks=chunks)) == (200, BF16)
    assert asyncio.run(ask(b"{}")) == (200, None) == asyncio.run(ask(b"", method="GET"))
    for wrong in ({"custom_params": {"mixquant": {"prefill": "y" * 200_000}}}, {"custom_params": [1]}):
        status, answer = asyncio.run(ask(json.dumps(wrong).encode()))
        assert status == 400 and "allowed: " in answer["error"]["message"] and len(json.dumps(answer)) < 700


@pytest.mark.parametrize(("path", "status"), [("/x/generate", 200), ("/x/api/generate", 400), ("/api/generate", 400)])
def test_routes_behind_a_root_path(path: str, status: int) -> None:
    body = json.dumps({"sampling_params": [{"custom_params": BF16}]}).encode()
    assert asyncio.run(ask(body, path=path, root_path="/x"))[0] == status


def test_a_request_does_not_inherit_a_policy() -> None:
    """uvicorn starts a pipelined request in the context of the one before it; GET /health_generate runs a token."""

    async def pipelined() -> list[Any]:
        http._bf16.set(True)
        seen: list[Any] = []

        async def endpoint(*_: Any) -> None:
            seen.append(verified())

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"}

        for method in ("GET", "POST"):
            scope = {"type": "http", "method": method, "path": "/", "headers": []}
            await http.PolicyLayer(endpoint)(scope, receive, receive)  # type: ignore[arg-type]
        return seen

    assert asyncio.run(pipelined()) == [None, None]


def test_the_layer_keeps_no_body_while_the_request_is_answered() -> None:
    class Chunk(dict[str, Any]):  # which can be referred to weakly
        pass

    messages = [Chunk(type="http.request", body=b"{} ", more_body=more) for more in (True, False)]
    kept = [weakref.ref(message) for message in messages]
    alive: list[int] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def endpoint(_scope: Any, receive: Any, _send: Any) -> None:
        for _ in kept:
            await receive()
        alive.append(sum(ref() is not None for ref in kept))

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    asyncio.run(http.PolicyLayer(endpoint)(scope, receive, receive))  # type: ignore[arg-type]
    assert alive == [0]


def test_a_web_socket_with_a_policy_is_closed() -> None:
    sent: list[Any] = []
    texts = ['{"type": "session.update"}', json.dumps({"session": {"custom_params": BF16}})]

    async def receive() -> Any:
        return {"type": "websocket.receive", "text": texts.pop(0)}

    async def send(message: Any) -> None:
        sent.append(message)

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["text"] and (await receive())["type"] == "websocket.disconnect"

    asyncio.run(http.PolicyLayer(endpoint)({"type": "websocket"}, receive, send))
    assert [message["code"] for message in sent] == [1008]


# Imported into pytest, 0.5.23's HTTP server ends it with a segmentation fault when Python exits.
_SERVER = """
import json
from mixquant_sglang.host.hooks import http, registry
from sglang.srt.entrypoints.http_server import app

def walk(routes):
    for route in routes:
        if hasattr(route, "path"):
            yield route.path, sorted(getattr(route, "methods", None) or [type(route).__name__])
        yield from walk(getattr(getattr(route, "original_router", route), "routes", None) or ())

targets = [registry.target_of(hook) in hook.targets for hook in registry.hooks_of("http")]
before = [layer.cls.__name__ for layer in app.user_middleware]
http.read_policies()
http.read_policies()
after = [layer.cls.__name__ for layer in app.user_middleware]
print(json.dumps([targets, before, after, list(walk(app.routes))]))
"""


@pytest.fixture(scope="module")
def http_server() -> Any:
    command = [sys.executable, "-W", "ignore", "-c", _SERVER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_layer_is_put_behind_sglangs_own_once(http_server: Any) -> None:
    targets, before, after, _ = http_server
    assert targets == [True] and before and after == [*before, "PolicyLayer"]


# Routes that take a POST and make no prompt run, beside those that change weights, profile or look after the server.
# fmt: off
_NO_PROMPT = {
    "/abort_request", "/add_external_corpus", "/api/show", "/begin_weight_update", "/clear_hicache_storage_backend",
    "/close_session", "/configure_logging", "/continue_generation", "/destroy_weights_update_group", "/detokenize",
    "/dump_expert_distribution_record", "/end_weight_update", "/flush_cache", "/freeze_gc", "/get_weights_by_name",
    "/hicache/storage-backend", "/hicache/storage-backend/clear", "/init_weights_send_group_for_remote_instance",
    "/init_weights_update_group", "/load_lora_adapter", "/load_lora_adapter_from_tensors", "/open_session",
    "/parse_function_call", "/pause_generation", "/pd_role_switch", "/release_memory_occupation",
    "/remove_external_corpus", "/resume_memory_occupation", "/scale_elastic_ep", "/send_weights_to_remote_instance",
    "/separate_reasoning", "/set_internal_state", "/set_trace_level", "/slow_down",
    "/start_expert_distribution_record", "/start_profile", "/stop_expert_distribution_record", "/stop_profile",
    "/tokenize", "/unload_lora_adapter", "/update_weight_version", "/update_weights_from_disk",
    "/update_weights_from_distributed", "/update_weights_from_ipc", "/update_weights_from_tensor", "/v1/detokenize",
    "/v1/messages/count_tokens", "/v1/responses/{response_id}/cancel", "/v1/tokenize", "/weights_checker",
}
# fmt: on


@pytest.mark.slow
def test_the_table_knows_every_route_that_runs_a_prompt(http_server: Any) -> None:
    takes = {path for path, methods in http_server[3] if {*methods} - {"GET", "HEAD", "OPTIONS"}}
    assert {"/generate", "/v1/chat/completions", "/v1/messages", "/api/chat"} <= takes, "routes were not found"
    listed = re.findall(r"^\| `(/[^`]*)`", DOCS.read_text(), re.MULTILINE)
    assert takes - _NO_PROMPT <= {*listed}, "a route that may run a prompt is not in docs/requests.md"
    assert not _NO_PROMPT & {*listed} and len({*listed}) == len(listed)
