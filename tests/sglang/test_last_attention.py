"""The last layer's attention for the rows that are read: SGLang's own FlashAttention back end, and on the CPU the
kernel's mathematics in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import DECODE_PASS, Pass, scope
from mixquant_sglang.recipe.select import Device, select
from tests.support.flash_attention import DIM, HEADS, attention, batch
from tests.support.flash_attention import flash_attention_module as flash

__all__ = ["flash"]

attends_whole = pytest.importorskip("mixquant_sglang.versions.attention").attends_whole

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CHUNK, LAST_CHUNK, DECODING = RequestRows(40, 0, 900), RequestRows(25, 40, 65), RequestRows(1, 9, 4, decoding=True)
RETRACTED, ASKED_BF16 = RequestRows(6, 20, 22), RequestRows(3, 0, 3, bf16=True)
BATCHES = {
    "one prompt": [RequestRows(300, 0, 300)],
    "prefix": [RequestRows(17, 411, 428)],
    "several": [RequestRows(4, 0, 4), LAST_CHUNK, RequestRows(130, 70, 200), RequestRows(2, 33, 35)],
    "middle chunk": [RequestRows(40, 80, 900)],
    "middle chunk and others": [LAST_CHUNK, CHUNK, DECODING],
    "more rows than one": [CHUNK, RETRACTED, ASKED_BF16, DECODING],
}


def plan(requests: list[RequestRows], device: str, *, protect: bool, **more: bool) -> Pass:
    asked = replace(recipe.load("nvfp4-emulated"), protect_last_prompt_token=protect)
    run = Runtime(asked, select(asked, Device("this CPU", None)))
    run.schedule.prunes = run.schedule.prunes_attention = True
    return run.schedule.prefill(requests, torch.device(device), **more).running


@pytest.fixture(autouse=True)
def however_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixquant_sglang.passes.limits.ATTENTION_PAIRS", 0)


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch, flash: ModuleType) -> list[int]:
    """The rows of each call of the kernel."""
    seen: list[int] = []
    kernel: Callable[..., torch.Tensor] = flash.flash_attn_with_kvcache

    def counted(q: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append(len(q))
        return kernel(q=q, **more)

    monkeypatch.setattr(flash, "flash_attn_with_kvcache", counted)
    return seen


def install(backend: Any, layer: torch.nn.Module) -> None:
    from mixquant_sglang.layers.attention import ExtendOfReadRows

    assert not attends_whole(backend, layer)
    backend.forward_extend = ExtendOfReadRows(backend, layer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_read_rows_are_those_of_the_whole_attention(
    flash: ModuleType, queries: list[int], name: str, protect: bool, in_graph: bool, page: int, device: str
) -> None:
    """``in_graph``: SGLang gives the result's place, rows of a larger buffer, as between segments of a graph."""
    requests, layer = BATCHES[name], attention()
    running = plan(requests, device, protect=protect)
    assert running.read is not None and running.queries is not None
    whole, pruned = (batch(flash, requests, device, page) for _ in range(2))
    before, metadata = whole.cache, pruned.backend.forward_metadata
    expected = whole.run(layer, running)
    install(pruned.backend, layer)
    tokens = len(expected)
    place = torch.full((tokens + 5, HEADS * DIM), 7.0, device=device).bfloat16()[:tokens] if in_graph else None
    got = pruned.run(layer, running, place)
    per_request = running.queries.starts.diff().tolist()
    assert queries == [tokens, len(running.queries.index)] and min(per_request) == 1
    assert (max(per_request) == 1) == (not protect or name != "more rows than one")
    assert got.shape == expected.shape and (place is None or got.data_ptr() == place.data_ptr())
    index = running.read.index
    assert {*index.tolist()} <= {*running.queries.index.tolist()}
    if device == "cpu":
        assert torch.equal(got[index], expected[index])
    else:
        torch.testing.assert_close(got[index], expected[index], rtol=2**-6, atol=2**-7)
    assert torch.equal(pruned.cache, whole.cache) and not torch.equal(whole.cache, before)
    assert pruned.backend.forward_metadata is metadata and pruned.facts._attn_output is place


def test_the_rest_is_as_it_was(flash: ModuleType, queries: list[int]) -> None:
    """Other layers, BF16 passes, passes of which all rows are read, captures, and what is not plain attention."""
    if torch.cuda.is_available():
        pytest.skip("nothing here depends on the kernel")
    requests, layer = BATCHES["several"], attention()
    tokens = sum(r.new for r in requests)
    running = plan(requests, "cpu", protect=True)
    given = batch(flash, requests, "cpu")
    expected = given.run(layer, DECODE_PASS)
    install(given.backend, layer)
    metadata = given.backend.forward_metadata
    plain = [
        lambda: given.run(attention(), running),
        lambda: given.run(layer, DECODE_PASS),
        lambda: given.run(layer, Pass(running.role, running.rows, running.read)),
        lambda: given.run(layer, plan(requests, "cpu", protect=True, reads_all=True)),
        lambda: given.run(layer, plan([*requests, DECODING], "cpu", protect=True)),
        lambda: given.run(layer, plan([RequestRows(tokens, 0, tokens)], "cpu", protect=True)),
    ]
    for run in plain:
        assert torch.equal(run(), expected)
    with scope(running):
        given.backend.forward(*given.rows, layer, given.facts, sinks=torch.zeros(HEADS))
    metadata.swa_spec_metadata = metadata
    assert torch.equal(given.run(layer, running), expected)
    assert queries == [tokens] * 9
    metadata.swa_spec_metadata = None
    given.run(layer, running)
    assert queries[-1] == len(requests)


def test_an_error_leaves_the_back_end_as_it_was(flash: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, layer = BATCHES["several"], attention()
    given = batch(flash, requests, "cpu")
    install(given.backend, layer)
    metadata, place = given.backend.forward_metadata, torch.empty_like(given.rows[0])

    def fails(**_: object) -> None:
        raise RuntimeError("of the kernel")

    monkeypatch.setattr(flash, "flash_attn_with_kvcache", fails)
    with pytest.raises(RuntimeError, match="of the kernel"):
        given.run(layer, plan(requests, "cpu", protect=True), place)
    assert given.backend.forward_metadata is metadata and given.facts._attn_output is place


def test_which_back_ends_and_layers_are_left_alone(flash: ModuleType) -> None:
    from sglang.srt.layers.radix_attention import AttentionType

    def backend(**changes: object) -> Any:
        made = batch(flash, BATCHES["one prompt"], "cpu").backend
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    class FlashAttentionBackend(flash.FlashAttentionBackend):
        pass

    other = FlashAttentionBackend.__new__(FlashAttentionBackend)
    other.fa_impl_ver = 3
    assert attends_whole(backend(), attention()) == ""
    assert attends_whole(other, attention()) == (
        "the attention back end is FlashAttentionBackend, not FlashAttention 3"
    )
    assert "FlashAttentionBackend 4," in attends_whole(backend(fa_impl_ver=4), attention())
    for name in ("use_mla", "has_local_attention", "has_swa", "kv_cache_is_mxfp8", "fa_skip_kv_cache"):
        assert attends_whole(backend(**{name: True}), attention()).endswith(f"({name})")
    for changes in (
        {"sliding_window_size": 128},
        {"is_cross_attention": True},
        {"attn_type": AttentionType.ENCODER_ONLY},
        {"use_irope": True},
    ):
        assert next(iter(changes)) in attends_whole(backend(), attention(**changes))
    assert "Identity" in attends_whole(backend(), torch.nn.Identity())


def test_what_the_config_installs_and_says(flash: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    from mixquant_sglang.host.lifecycle import LoadSteps
    from mixquant_sglang.layers.attention import ExtendOfReadRows
    from mixquant_sglang.layers.fused import fuse
    from mixquant_sglang.layers.last_layer import prune_last_layer

    from .test_fusion import block, causal_lm

    layer = block("nvfp4-emulated", "cpu", Device("this CPU", None))
    layer.self_attn.attn = attention()
    fuse(layer)
    model = causal_lm(layer)
    run = layer.mlp.down_proj.quant_method._runtime
    steps = LoadSteps(run, SimpleNamespace(ready=None))
    steps._pruned = model
    caplog.set_level(logging.INFO, "mixquant_sglang")

    def built(backend: Any, of: torch.nn.Module = model) -> str:
        caplog.clear()
        steps.finish_attention(SimpleNamespace(model=of, attn_backend=backend))
        return caplog.text

    flash_backend = batch(flash, BATCHES["one prompt"], "cpu").backend
    assert "computes all rows: what follows it reads all rows" in built(flash_backend)
    assert prune_last_layer(model)
    assert "computes all rows: the attention back end is SimpleNamespace, not" in built(SimpleNamespace())
    assert not run.schedule.prunes_attention
    assert built(flash_backend, torch.nn.Identity()) == "" and "forward_extend" not in vars(flash_backend)
    assert "leaves out unread rows in long prefill passes" in built(flash_backend)
    assert run.schedule.prunes_attention and isinstance(flash_backend.forward_extend, ExtendOfReadRows)
