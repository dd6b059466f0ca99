"""What a prefill server says to a decode server, through SGLang's own registry, and what the latter makes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

from mixquant_sglang import recipe
from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks import pairs as hooks
from mixquant_sglang.host.runtime import Pair, Runtime
from mixquant_sglang.recipe import pairs
from mixquant_sglang.recipe.select import Device
from mixquant_sglang.versions import bootstrap
from mixquant_sglang.weights.sample import sample
from tests.support.server import free_port

CPU = Device("this CPU", None)


def half(mode: str, name: str = "nvfp4") -> Runtime:
    asked = recipe.load(name)
    own, selection = pairs.select_for(asked, CPU, mode)
    pair = Pair(mode, asked, pairs.kv_fingerprint(asked, CPU), model="m", weights="w")
    return Runtime(own, selection, pair=pair)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of SGLang's registry, with our path."""
    opened = _wrap_fn(CommonKVBootstrapServer._setup_routes, hooks.open_registry, HookType.AFTER)
    monkeypatch.setattr(CommonKVBootstrapServer, "_setup_routes", opened)
    port = free_port()
    server = CommonKVBootstrapServer("127.0.0.1", port)
    deadline = time.monotonic() + 60
    while True:
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                break
        except requests.ConnectionError:
            assert time.monotonic() < deadline
        time.sleep(0.05)
    yield port
    server.close()


def manager(port: int, **args: Any) -> Any:
    """What the hooks look at of SGLang's ``CommonKVManager`` of a first rank."""
    flags = dict.fromkeys(
        (
            "disaggregation_decode_enable_offload_kvcache",
            "disaggregation_decode_enable_radix_cache",
            "hicache_storage_backend",
        )
    )
    ranks = dict.fromkeys(("attn_tp_rank", "attn_cp_rank", "attn_dp_rank", "pp_rank", "system_dp_rank"), 0)
    return SimpleNamespace(
        dist_init_addr=None,
        bootstrap_host="0.0.0.0",
        bootstrap_port=port,
        prefill_info_table={},
        server_args=SimpleNamespace(**{**flags, **args}),
        **ranks,
    )


def asked(found: Any, port: int) -> bool:
    """``check_pair`` around an SGLang that has just read the ranks, as it does once for each life of a server."""

    def original(found: Any, address: str) -> bool:
        found.prefill_info_table.setdefault(address, SimpleNamespace())
        return True

    return bool(hooks.check_pair(original, found, f"127.0.0.1:{port}"))


def become(monkeypatch: pytest.MonkeyPatch, run: Runtime) -> Runtime:
    monkeypatch.setattr(runtime, "_runtime", run)
    monkeypatch.setattr("mixquant_sglang.versions.storage.dialect", lambda: SimpleNamespace(resolved=lambda args: args))
    return run


def test_what_one_half_says_the_other_reads(registry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{registry}"
    prefill, decode = half(pairs.PREFILL), half(pairs.DECODE)
    assert prefill.fingerprint == decode.fingerprint and not decode.selection.kernels
    become(monkeypatch, decode)
    found = manager(registry)
    assert not asked(found, registry), "the ranks may be read before the prefill server has said what it is"
    assert found.prefill_info_table == {}, "SGLang asks again"
    become(monkeypatch, prefill)
    hooks.say_what_we_are(manager(registry))
    become(monkeypatch, decode)
    assert asked(found, registry) and decode.pair is not None
    assert decode.pair.said[address] == (found.prefill_info_table[address], "")
    monkeypatch.setattr(bootstrap, "ask", lambda _: pytest.fail("asked again"))
    assert asked(found, registry)


def test_a_server_that_comes_back_is_asked_again(registry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = become(monkeypatch, half(pairs.DECODE))
    found, address = manager(registry), f"127.0.0.1:{registry}"
    for name, verdict in (("nvfp4", ""), ("fp8", "recipe nvfp4"), ("nvfp4", "")):
        become(monkeypatch, half(pairs.PREFILL, name))
        hooks.say_what_we_are(manager(registry))
        become(monkeypatch, decode)
        assert decode.pair is not None
        found.prefill_info_table.clear()  # as SGLang does when the heart does not beat
        assert asked(found, registry)
        said = decode.pair.said[address][1]
        assert verdict in said and bool(said) == bool(verdict)


def test_refused_requests_end_with_the_reason_and_the_prefill_server_is_told(
    registry: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(monkeypatch, half(pairs.PREFILL, "fp8"))
    hooks.say_what_we_are(manager(registry))
    become(monkeypatch, half(pairs.DECODE))
    assert asked(manager(registry), registry)
    done: list[Any] = []
    receiver = SimpleNamespace(
        bootstrap_addr=f"127.0.0.1:{registry}",
        bootstrap_room=3,
        abort=lambda: done.append("abort"),
        kv_mgr=SimpleNamespace(record_failure=lambda room, why: done.append((room, why))),
    )
    hooks.refuse_pair(None, receiver, 0)
    assert done[0] == "abort" and done[1][0] == 3 and done[1][1].startswith("mixquant: the decode server has recipe")
    done.clear()
    hooks.refuse_pair(None, replace_addr(receiver), 0)
    assert done == []


def replace_addr(receiver: Any) -> Any:
    return SimpleNamespace(**{**vars(receiver), "bootstrap_addr": "127.0.0.1:1"})


def test_what_is_kept_is_of_one_kind_of_prefill_server(registry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = become(monkeypatch, half(pairs.DECODE))
    assert decode.pair is not None
    same = hooks._identity(half(pairs.PREFILL))
    other = replace(same, fingerprint="0" * 16)
    for flag, verdicts in (
        ("disaggregation_decode_enable_radix_cache", [True, False]),
        ("disaggregation_decode_enable_offload_kvcache", [False, True]),
        (None, [True, True]),
    ):
        decode.pair.kept = ""
        found = manager(registry, **({flag: True} if flag else {}))
        fits = [hooks._verdict(decode, found, theirs) is None for theirs in (other, same)]
        assert fits == verdicts


def test_weights_are_no_longer_compared_once_they_are_updated(registry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = become(monkeypatch, half(pairs.PREFILL))
    hooks.say_what_we_are(manager(registry))
    assert bootstrap.ask(f"127.0.0.1:{registry}")["weights"] == "w"
    prefill.weights.hold("an update")
    assert bootstrap.ask(f"127.0.0.1:{registry}")["weights"] == ""


def test_only_a_first_rank_speaks(registry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, half(pairs.PREFILL))
    second = manager(registry)
    second.attn_tp_rank = 1
    hooks.say_what_we_are(second)
    assert requests.get(f"http://127.0.0.1:{registry}/mixquant", timeout=5).status_code == 503


def test_samples_tell_weights_apart_whatever_the_ranks() -> None:
    def model(seed: int, rows: int = 64) -> torch.nn.Module:
        torch.manual_seed(seed)
        whole = torch.nn.Sequential(torch.nn.Linear(48, 64, dtype=torch.bfloat16), torch.nn.LayerNorm(64))
        whole[0].weight = torch.nn.Parameter(whole[0].weight[:rows].detach().clone())
        return whole

    assert sample(model(1)) == sample(model(1)) == sample(model(1, rows=32))
    assert sample(model(1))[0] == sample(model(2))[0] and sample(model(1))[1] != sample(model(2))[1]
    assert sample(model(1))[0] != sample(torch.nn.Sequential(model(1)))[0]
