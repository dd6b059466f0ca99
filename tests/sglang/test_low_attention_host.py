"""Which servers run prefill attention in FP8, and what they say."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host import low_attention as host
from mixquant_sglang.host.runtime import Pair, Runtime
from mixquant_sglang.layers.gathered_attention import Gathering, Heads
from mixquant_sglang.layers.low_scratch import LowScratch
from mixquant_sglang.passes.attention import LowLimits
from mixquant_sglang.recipe.roles import Kind, Role
from mixquant_sglang.recipe.select import Device, select

HEADS = Heads(8, 2, 64)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
NAMES = {0: "model.layers.0.self_attn.attn", 1: "model.layers.1.self_attn.attn"}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "heads_of", lambda model: model)
    monkeypatch.setattr(host, "find_layers", lambda model, heads, low: low.layers.update(NAMES if model else {}))
    monkeypatch.setattr(host, "dialect", lambda: SimpleNamespace(resolved=lambda args: args))
    monkeypatch.setattr(host.batches, "most_prefill_rows", lambda _: 8192)
    monkeypatch.setattr(host, "_compare", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    made = LowScratch.of
    monkeypatch.setattr(
        LowScratch, "of", lambda heads, tokens, rows, _, **more: made(heads, tokens, min(rows, 64), CPU, **more)
    )


def server(**more: Any) -> Any:
    args: dict[str, Any] = {"prefill_attention_backend": None, "attention_backend": "fa3", "max_total_tokens": None}
    args |= {"kv_cache_dtype": "auto"}
    config = SimpleNamespace(context_len=more.pop("context", 40960))
    return SimpleNamespace(server_args=SimpleNamespace(**args | more), model=HEADS, model_config=config)


def runtime(**more: Any) -> Runtime:
    known = replace(recipe.load("fp8-attention"), **more)
    return Runtime(known, select(replace(known, kernel="auto"), Device("a GPU", (9, 0))))


def test_a_server_with_flash_attention_3(caplog: pytest.LogCaptureFixture) -> None:
    run = runtime()
    with caplog.at_level(logging.INFO):
        host.prepare_low_attention(run, server(), CUDA)
    assert run.schedule.low_attention == LowLimits(8192, 40960) and run.low_attention is not None
    assert run.low_attention.kernel == "native" and run.low_attention.sample == 1024
    assert run.schedule.table[Role.PROMPT, Kind.ATTENTION] == "fp8"
    assert run.schedule.table[Role.PROTECTED, Kind.ATTENTION] == "bf16"
    said = "attention of 2 layers runs in fp8 (FlashAttention 3) for requests of 8192 to 40960 tokens, of which 1024 or"
    assert said in caplog.text
    run.low_attention.count(7)
    state = run.state()["attention"]
    assert state["rows"]["fp8"] == 7 and state["passes"] == 1 and state["layers"] == {"fp8": 2, "bf16": 0}
    few = runtime()
    host.prepare_low_attention(few, server(max_total_tokens=20000), CUDA)
    assert few.schedule.low_attention == LowLimits(8192, 20000)


def test_keys_and_values_lie_where_others_are_gathered() -> None:
    for tokens, shares in ((20480, True), (20000, False)):
        run = runtime()
        held = [torch.empty(tokens, HEADS.keys * HEADS.size, dtype=torch.bfloat16) for _ in range(2)]
        run.gathering = Gathering(HEADS, *held, {})
        host.prepare_low_attention(run, server(), CUDA)
        assert run.low_attention is not None and run.low_attention.scratch is not None
        scratch = run.low_attention.scratch
        assert scratch.keys.shape == scratch.values.shape == (40960, 2, 64) and scratch.shared is shares
        assert [scratch.keys.data_ptr(), scratch.values.data_ptr()] == [x.data_ptr() for x in held] or not shares
        assert scratch.nbytes == 64 * 8 * 64 * (1 + 4 * 2) + 4 * 8 * 64 * 4 + (0 if shares else 2 * 40960 * 128)


def test_a_server_that_emulates_it(caplog: pytest.LogCaptureFixture) -> None:
    run = runtime(attention_from=300)
    with caplog.at_level(logging.INFO):
        host.prepare_low_attention(run, server(attention_backend="torch_native"), CPU)
    assert run.schedule.low_attention == LowLimits(300, 40960) and run.schedule.low_attention.rows == 300
    assert run.low_attention is not None and run.low_attention.scratch is None and run.low_attention.sample == 300
    assert "runs in fp8 (emulated: for measuring quality, it is slow) for requests of 300 to" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another back end": (
        {},
        {"attention_backend": "triton"},
        "the attention back end is triton: fp8 needs fa3, or",
    ),
    "that of prefill": ({}, {"prefill_attention_backend": "flashinfer"}, "the attention back end is flashinfer"),
    "FP8 cache": ({}, {"kv_cache_dtype": "fp8_e4m3"}, "keys and values are cached in fp8_e4m3"),
    "emulated": ({"kernel": "emulated"}, {}, "kernel: emulated, and only torch_native emulates it"),
    "native": ({"kernel": "native"}, {"attention_backend": "torch_native"}, "kernel: native, and with torch_native it"),
    "short sequences": ({}, {"context": 4096}, "requests have at most 4096 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_keep_bf16_and_say_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, arguments, reason = REFUSED[name]
    run = runtime(**changes)
    host.prepare_low_attention(run, server(**arguments), CUDA)
    assert f"attention stays BF16 ({reason}" in caplog.text and NAMES[0] in caplog.text
    assert run.schedule.low_attention is None and run.schedule.table[Role.PROMPT, Kind.ATTENTION] == "bf16"
    state = run.state()["attention"]
    assert state["layers"] == {"fp8": 0, "bf16": 2} and [why.startswith(reason) for why in state["stays_bf16"]] == [
        True
    ]
    host.install_low_attention(run, SimpleNamespace())  # nothing to do


def test_other_gpus_keep_bf16(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    host.prepare_low_attention(runtime(), server(), CUDA)
    assert "attention stays BF16 (FlashAttention 3 has fp8 on SM90 alone)" in caplog.text


def no_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize(
    ("compare", "reason"), [(lambda *_: "it is off", "it is off"), (no_memory, "too little memory for its scratch")]
)
def test_a_kernel_that_is_off_or_does_not_fit(
    compare: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host, "_compare", compare)
    run = runtime()
    host.prepare_low_attention(run, server(), CUDA)
    assert f"attention stays BF16 ({reason})" in caplog.text and run.low_attention is not None
    assert run.low_attention.scratch is None and run.schedule.low_attention is None


def test_layers_that_go_to_bf16_while_serving() -> None:
    """Once none is left, roles do not say fp8 any more."""
    run = runtime()
    host.prepare_low_attention(run, server(), CUDA)
    assert run.low_attention is not None
    run.low_attention.leave([0], "its first pass was off")
    assert run.schedule.low_attention is not None and run.state()["roles"]["prompt"]["attention"] == "fp8"
    run.low_attention.leave([1], "its first pass was off")
    assert run.schedule.low_attention is None and run.state()["roles"]["prompt"]["attention"] == "bf16"
    assert run.state()["attention"]["layers"] == {"fp8": 0, "bf16": 2}


def test_who_does_not_ask_gets_nothing() -> None:
    decode = runtime()
    decode.pair = Pair("decode", decode.recipe)
    for run in (runtime(attention="bf16"), decode):
        host.prepare_low_attention(run, server(), CUDA)
        assert run.low_attention is None and "attention" not in run.state()
        host.install_low_attention(run, SimpleNamespace())


def test_a_model_without_such_layers(caplog: pytest.LogCaptureFixture) -> None:
    run, runner = runtime(), server()
    runner.model = None
    host.prepare_low_attention(run, runner, CUDA)
    assert "attention stays BF16: no layer of this model can take fp8" in caplog.text
    assert run.schedule.low_attention is None


def test_a_back_end_that_turns_out_another(caplog: pytest.LogCaptureFixture) -> None:
    run = runtime()
    host.prepare_low_attention(run, server(attention_backend="torch_native"), CPU)
    host.install_low_attention(run, SimpleNamespace())
    assert "attention stays BF16 (the attention back end is SimpleNamespace, not SGLang's torch_native)" in caplog.text
    assert run.schedule.low_attention is None
