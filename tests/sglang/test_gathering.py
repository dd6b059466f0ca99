"""Which servers gather keys and values for prefill attention, and what they say."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host import gathering
from mixquant_sglang.host.runtime import Pair, Runtime
from mixquant_sglang.layers.gathered_attention import Gathering, Heads
from mixquant_sglang.recipe.select import Device, select

HEADS = Heads(8, 2, 64)
FOUND = Gathering(HEADS, torch.empty(4, 128), torch.empty(4, 128), {2048: 4096})
CUDA = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """With what the heads were asked about."""
    seen: list[tuple[Any, ...]] = []

    def prepare(*args: Any) -> Any:
        seen.append((*args[:2], *args[4:]))  # but for the kernels and the device
        return FOUND

    monkeypatch.setattr(gathering, "prepare", prepare)
    monkeypatch.setattr(gathering, "heads_of", lambda model: model)
    monkeypatch.setattr(gathering, "flash_attention_3", lambda: (None, None))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gathering, "dialect", lambda: SimpleNamespace(resolved=lambda args: args))
    return seen


def server(**more: Any) -> Any:
    args: dict[str, Any] = {"prefill_attention_backend": None, "attention_backend": "fa3", "max_total_tokens": None}
    args |= {"kv_cache_dtype": "auto", "page_size": 1}
    config = SimpleNamespace(context_len=40960)
    return SimpleNamespace(server_args=SimpleNamespace(**args | more), model=HEADS, model_config=config)


def runtime(**more: Any) -> Runtime:
    known = replace(recipe.load("fp8"), **more)
    return Runtime(known, select(known, Device("a GPU", (9, 0))))


def test_a_server_gathers_for_as_many_tokens_as_a_sequence_can_have(
    asked: list[tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    run = runtime()
    assert "gathered_attention" not in run.state()
    with caplog.at_level(logging.INFO):
        gathering.prepare_gathering(run, server(), CUDA)
        gathering.prepare_gathering(runtime(), server(max_total_tokens=5000, page_size=64), CUDA)
    assert asked == [(HEADS, 40960, 1), (HEADS, 5000, 64)]
    assert run.state()["gathered_attention"] == FOUND.state()
    assert "attention of long prefills reads gathered keys and values (the same bits" in caplog.text


def test_others_do_not(asked: list[tuple[Any, ...]]) -> None:
    decode = runtime()
    decode.pair = Pair("decode", decode.recipe)
    nobody = server()
    nobody.model = None  # no plain attention in it
    for run, runner, device in (
        (runtime(), server(), torch.device("cpu")),
        (runtime(), server(attention_backend="triton"), CUDA),
        (runtime(), server(prefill_attention_backend="flashinfer"), CUDA),
        (runtime(), server(kv_cache_dtype="fp8_e4m3"), CUDA),
        (runtime(fuse=False), server(), CUDA),
        (runtime(), nobody, CUDA),
        (decode, server(), CUDA),
        (runtime(), server(enable_dp_attention=True), CUDA),
        (runtime(prefill="bf16"), server(enable_dp_attention=True), CUDA),  # its passes too have rows of no request
        (runtime(prefill="bf16"), server(attn_dp_size=2), CUDA),
    ):
        gathering.prepare_gathering(run, runner, device)
        assert run.gathering is None
    assert asked == []


def test_what_is_in_the_way_is_said(
    asked: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gathering, "prepare", no_memory)
    with caplog.at_level(logging.INFO):
        gathering.prepare_gathering(runtime(), server(), CUDA)
    assert "reads pages, as in SGLang: too little memory to time another way" in caplog.text
    with caplog.at_level(logging.INFO):
        gathering.prepare_gathering(runtime(), server(kv_cache_dtype="fp8_e4m3"), CUDA)
    assert "reads pages, as in SGLang: they hold fp8_e4m3" in caplog.text
    run = runtime()
    run.gathering = FOUND
    with caplog.at_level(logging.INFO):
        gathering.install_gathering(run, SimpleNamespace())
    assert run.gathering is None and "the attention back end is SimpleNamespace" in caplog.text
