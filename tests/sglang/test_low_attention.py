"""Prefill attention in FP8 behind SGLang's own back ends: which rows get it, which keep their bits, what is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.kernels.attention import attend_emulated
from mixquant_sglang.layers import low_attention
from mixquant_sglang.layers.gathered_attention import Gathering, Heads, Kernels, gather_attention
from mixquant_sglang.layers.low_attention import LowAttention, LowExtend, find_layers, lower_attention
from mixquant_sglang.layers.low_scratch import LowScratch
from mixquant_sglang.passes.attention import LowLimits, LowRows
from mixquant_sglang.passes.rows import RequestRows, split_rows
from mixquant_sglang.passes.running import Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.versions.attention import flash_attention_3
from tests.support.flash_attention import DIM, HEADS, KV_HEADS, attend, attend_whole, attention, batch
from tests.support.flash_attention import flash_attention_module as flash

__all__ = ["flash"]

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LIMITS = LowLimits(64, 4000)
LONG, CHUNK, SHORT = RequestRows(120, 0, 120), RequestRows(80, 300, 900), RequestRows(30, 50, 80)
DECODING, ASKED_BF16 = RequestRows(1, 200, 150, decoding=True), RequestRows(100, 10, 110, bf16=True)
BATCHES = {
    "one prompt": [LONG],
    "middle chunk": [CHUNK],
    "several": [SHORT, LONG, DECODING, CHUNK, ASKED_BF16],
    "too short": [SHORT, DECODING],
}


class Emulated(LowScratch):
    """In place of the kernels, which need a GPU."""

    def attend(self, _whole: Any, q: Any, cache: Any, slots: Any, out: Any, **options: Any) -> None:
        at = slots.long()
        tokens = options["sample"]
        out.copy_(attend_emulated(q, cache[0][at], cache[1][at], scaling=options["scaling"], tokens=tokens))


def scratch() -> LowScratch:
    kind = LowScratch if GPU else Emulated
    return kind.of(Heads(HEADS, KV_HEADS, DIM), 4000, 400, torch.device(DEVICE))


def low_attention_of(counted: list[int] | None = None, **more: Any) -> LowAttention:
    counts: list[int] = [] if counted is None else counted
    given: dict[str, Any] = {"kernel": "native", "sample": 64, "tokens": 64, "scratch": scratch()}
    given |= {"layers": {1: "model.layers.1.attn"}, "count": counts.append}
    return LowAttention(**given | more)


def running(requests: list[RequestRows]) -> Pass:
    rows = split_rows(requests, last_prompt_token=True)
    low = LowRows(requests, rows.shares, LIMITS, torch.device(DEVICE))
    return Pass(Role.PROMPT, attention=low if low.requests else None)


def kernels() -> Kernels:
    return Kernels(*flash_attention_3()) if GPU else Kernels(attend_padded, attend_whole)


def attend_padded(*, q: torch.Tensor, cu_seqlens_q: torch.Tensor, out: torch.Tensor | None = None, **call: Any) -> Any:
    """Over the rows of the pass, of buffers that may have more."""
    rows = int(cu_seqlens_q[-1])
    out = torch.empty_like(q) if out is None else out
    attend(q=q[:rows], cu_seqlens_q=cu_seqlens_q, out=out[:rows], **call)
    return out


def low_rows(requests: list[RequestRows]) -> torch.Tensor:
    """Which rows are in FP8."""
    found = []
    for request in requests:
        low = torch.zeros(request.new, dtype=torch.bool)
        if request in (LONG, CHUNK):
            low[: request.new - (request is LONG)] = True  # but for the last prompt token
        found.append(low)
    return torch.cat(found).to(DEVICE)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("padding", [None, 0, 5], ids=["eager", "in a graph", "in a graph, padded"])
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_rows_that_are_low_and_rows_that_are_not(
    flash: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, verify: bool, padding: int | None, page: int
) -> None:
    """``padding``: rows of a graph's buffers behind those of the pass."""
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", kernels().paged)
    requests, layer, counted = BATCHES[name], attention(), list[int]()
    whole, given = (batch(flash, requests, DEVICE, page) for _ in range(2))
    expected = whole.run(layer, running([]))
    low = low_attention_of(counted, verify=verify)
    assert lower_attention(given.backend, low, kernels()) == ""
    place, rows = None, len(given.rows[0])
    if padding is not None:
        place = torch.full((rows + padding, HEADS * DIM), 7.0, device=DEVICE).bfloat16()
        q, k, v = given.rows
        given.rows = (torch.cat([q, q[:padding]]), k, v)
    is_low, plan = low_rows(requests), running(requests)
    for _ in range(2):  # as of two layers
        got = given.run(layer, plan, place)[:rows]
    assert torch.equal(given.cache, whole.cache)  # in BF16, as ever
    if GPU:  # fewer queries of a request may be split in another way
        assert torch.allclose(got[~is_low].float(), expected[~is_low].float(), atol=2e-2, rtol=2e-2)
    else:
        assert torch.equal(got[~is_low], expected[~is_low])
    assert counted == ([int(is_low.sum())] if is_low.any() else [])
    if is_low.any():
        assert 0.005 < error(got[is_low], expected[is_low]) < 0.08
        assert low.layers == {1: "model.layers.1.attn"} and low.stays_bf16 == {}
    assert place is None or got.data_ptr() == place.data_ptr()


@pytest.mark.parametrize("name", ["one prompt", "middle chunk"])
def test_a_rows_bits_do_not_depend_on_neighbours(flash: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", kernels().paged)
    one = BATCHES[name][0]
    alone, among = (batch(flash, requests, DEVICE) for requests in ([one], BATCHES["several"]))
    at = BATCHES["several"].index(one)
    start = sum(request.new for request in BATCHES["several"][:at])
    rows = slice(start, start + one.new)
    for mine, theirs in zip(alone.rows, among.rows, strict=True):
        theirs[rows] = mine
    _same_prefix(alone, among, at, one)
    for given in (alone, among):
        assert lower_attention(given.backend, low_attention_of(verify=False), kernels()) == ""
    low, mine = low_rows([one]), alone.run(attention(), running([one]))
    theirs = among.run(attention(), running(BATCHES["several"]))[rows]
    assert torch.equal(mine[low], theirs[low])


def _same_prefix(alone: Any, among: Any, at: int, one: RequestRows) -> None:
    mine, theirs = alone.backend.forward_metadata.page_table[0], among.backend.forward_metadata.page_table[at]
    for a, b in zip(alone.backend.token_to_kv_pool.buffers, among.backend.token_to_kv_pool.buffers, strict=True):
        b[theirs[: one.prefix].long()] = a[mine[: one.prefix].long()]


def test_it_goes_past_gathering_and_leaves_other_passes_to_it(
    flash: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", kernels().paged)
    given, counted = batch(flash, BATCHES["one prompt"], DEVICE), list[int]()
    held = [torch.empty(200, KV_HEADS * DIM, device=DEVICE).bfloat16() for _ in range(2)]
    gathering = Gathering(Heads(HEADS, KV_HEADS, DIM), *held, {1: 0})
    assert gather_attention(given.backend, gathering, kernels()) == ""
    assert lower_attention(given.backend, low_attention_of(counted), kernels()) == ""
    given.run(attention(), running(BATCHES["one prompt"]))
    assert counted == [119] and gathering.passes == 0
    given.run(attention(), running([]))
    assert counted == [119] and gathering.passes == 1


@pytest.mark.parametrize("changed", [{"layers": {}}, {"layers": {2: "another"}}])
def test_layers_that_are_not_low_are_sglangs(
    flash: ModuleType, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", kernels().paged)
    whole, given = (batch(flash, BATCHES["several"], DEVICE) for _ in range(2))
    lower_attention(given.backend, low_attention_of(**changed), kernels())
    want = whole.run(attention(), running([]))
    assert torch.equal(given.run(attention(), running(BATCHES["several"])), want)


def test_what_is_more_than_causal_attention_stays_bf16(
    flash: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without_sinks(*, sinks: Any = None, **call: Any) -> Any:
        del sinks
        return kernels().paged(**call)

    monkeypatch.setattr(flash, "flash_attn_with_kvcache", without_sinks)
    counted: list[int] = []
    low = low_attention_of(counted)
    given, plan = batch(flash, BATCHES["one prompt"], DEVICE), running(BATCHES["one prompt"])
    lower_attention(given.backend, low, kernels())
    given.backend.forward_metadata.local_attn_metadata = SimpleNamespace()  # a pass, not a layer
    given.run(attention(), plan)
    given.backend.forward_metadata.local_attn_metadata = None
    few = batch(flash, BATCHES["one prompt"], DEVICE)
    few.rows = (few.rows[0][-1:], *few.rows[1:])  # as for the last layer's rows that are read
    few.backend.forward_metadata.cu_seqlens_q = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    few.backend.forward_metadata.max_seq_len_q = 1
    lower_attention(few.backend, low, kernels())
    few.run(attention(), plan)
    assert counted == [] and len(low.layers) == 1
    sinks = torch.zeros(HEADS, device=DEVICE).bfloat16()
    with scope(plan):
        given.backend.forward(*given.rows, attention(), given.facts, sinks=sinks)
    assert counted == [] and low.layers == {} and low.stays_bf16 == {"it takes sinks": ["model.layers.1.attn"]}
    assert "attention stays BF16 (it takes sinks): model.layers.1.attn" in caplog.text


def test_a_layer_that_is_far_off_stays_bf16(
    flash: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", kernels().paged)
    monkeypatch.setattr(low_attention, "MOST_ERROR", 0.01)
    whole, given = (batch(flash, BATCHES["several"], DEVICE) for _ in range(2))
    counted: list[int] = []
    low = low_attention_of(counted)
    lower_attention(given.backend, low, kernels())
    with caplog.at_level(logging.WARNING):
        got = given.run(attention(), running(BATCHES["several"]))
    assert torch.equal(got, whole.run(attention(), running([])))
    assert counted == [] and low.state()["layers"] == {"fp8": 0, "bf16": 1}
    assert "% off BF16 attention in its first pass): model.layers.1.attn" in caplog.text


# -- emulated, behind torch_native -------------------------------------------------------------------------------------


def torch_native(requests: list[RequestRows]) -> tuple[Any, Any, tuple[torch.Tensor, ...]]:
    """SGLang's back end with the keys and values of the prefixes in its cache, a batch, and its q, k and v."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    torch.manual_seed(0)
    lengths = [r.prefix + r.new for r in requests]
    slots = (torch.randperm(sum(lengths)) + 1).split(lengths)
    buffers = [torch.randn(sum(lengths) + 1, KV_HEADS, DIM).bfloat16() for _ in range(2)]

    def write(_layer: object, at: Any, *rows: torch.Tensor) -> None:
        for buffer, new in zip(buffers, rows, strict=True):
            buffer[at.loc] = new

    backend = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    backend.use_sliding_window_kv_pool, backend.swa_out_cache_loc = False, None
    backend.req_to_token_pool = SimpleNamespace(req_to_token=torch.nn.utils.rnn.pad_sequence([*slots], True))
    backend.token_to_kv_pool = SimpleNamespace(
        set_kv_buffer=write, get_key_buffer=lambda _: buffers[0], get_value_buffer=lambda _: buffers[1]
    )
    facts = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        out_cache_loc=torch.cat([at[r.prefix :] for r, at in zip(requests, slots, strict=True)]),
        req_pool_indices=torch.arange(len(requests)),
        seq_lens=torch.tensor(lengths),
        extend_prefix_lens=torch.tensor([r.prefix for r in requests]),
        extend_seq_lens=torch.tensor([r.new for r in requests]),
        encoder_lens=None,
    )
    new = sum(r.new for r in requests)
    return backend, facts, tuple(torch.randn(new, n, DIM).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS))


@pytest.mark.parametrize("name", BATCHES)
def test_emulated_rows_that_are_low_and_rows_that_are_not(name: str) -> None:
    requests, counted = BATCHES[name], list[int]()
    got = []
    for low in (None, low_attention_of(counted, kernel="emulated", scratch=None)):
        backend, facts, (q, k, v) = torch_native(requests)
        if low is not None:
            assert lower_attention(backend, low, None) == ""
        with scope(running(requests)):
            got.append(backend.forward_extend(q.flatten(1), k, v, attention(), facts))
    is_low = low_rows(requests).cpu()
    assert torch.equal(got[0][~is_low], got[1][~is_low])  # to the last bit
    assert counted == ([int(is_low.sum())] if is_low.any() else [])
    if is_low.any():
        assert 0.005 < error(got[1][is_low], got[0][is_low]) < 0.08


def test_emulated_bits_of_a_row_do_not_depend_on_neighbours() -> None:
    backend, facts, (q, k, v) = torch_native(BATCHES["several"])
    assert lower_attention(backend, low_attention_of(kernel="emulated", scratch=None), None) == ""
    with scope(running(BATCHES["several"])):
        whole = backend.forward_extend(q.flatten(1), k, v, attention(), facts)
    one, rows = [CHUNK], slice(151, 231)
    for name in ("req_pool_indices", "seq_lens", "extend_prefix_lens", "extend_seq_lens"):
        setattr(facts, name, getattr(facts, name)[3:4])
    facts.out_cache_loc = facts.out_cache_loc[rows]
    with scope(running(one)):
        alone = backend.forward_extend(q[rows].flatten(1), k[rows], v[rows], attention(), facts)
    assert torch.equal(alone, whole[rows])


def test_an_emulated_layer_that_is_far_off_stays_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_attention, "MOST_ERROR", 0.01)
    counted: list[int] = []
    low = low_attention_of(counted, kernel="emulated", scratch=None)
    got = []
    for given in (None, low):
        backend, facts, (q, k, v) = torch_native([LONG])
        if given is not None:
            lower_attention(backend, given, None)
        with scope(running([LONG])):
            got.append(backend.forward_extend(q.flatten(1), k, v, attention(), facts))
    assert torch.equal(*got) and counted == [] and low.layers == {}


# -- layers, back ends, passes -----------------------------------------------------------------------------------------


def test_layers_are_sorted_by_what_they_are() -> None:
    class Model(torch.nn.Module):
        def __init__(self, **layers: torch.nn.Module) -> None:
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

    def at(number: int, **changes: Any) -> torch.nn.Module:
        layer: Any = attention(**changes)
        layer.layer_id = number
        return layer  # type: ignore[no-any-return]

    wide = at(5)
    wide.head_dim = wide.v_head_dim = 64  # type: ignore[assignment]
    found = low_attention_of(layers={})
    others = {"b": at(1, sliding_window_size=8), "c": at(2, logit_cap=30.0), "d": torch.nn.Identity()}
    model = Model(a=at(0), **others, e=wide, f=at(6, v_head_dim=64), g=at(7, is_cross_attention=True))
    find_layers(model, Heads(HEADS, KV_HEADS, DIM), found)
    assert found.layers == {0: "a"}
    assert found.stays_bf16 == {
        "sliding_window_size": ["b"],
        "logit_cap": ["c"],
        "its heads are others than those of most layers": ["e"],
        "latent attention, whose values are of another size than its keys": ["f"],
        "is_cross_attention": ["g"],
    }


def test_which_back_ends_can(flash: ModuleType) -> None:
    backend = batch(flash, BATCHES["one prompt"], DEVICE).backend
    backend.kv_cache_dtype_str = "fp8_e4m3"
    assert lower_attention(backend, low_attention_of(), kernels()) == "its keys and values are fp8_e4m3"
    reason = lower_attention(SimpleNamespace(), low_attention_of(scratch=None), None)
    assert reason == "the attention back end is SimpleNamespace, not SGLang's torch_native"
    backend = batch(flash, BATCHES["one prompt"], DEVICE).backend
    assert lower_attention(SimpleNamespace(prefill_backend=backend), low_attention_of(), kernels()) == ""
    assert isinstance(backend.forward_extend, LowExtend)


def test_rows_of_a_pass() -> None:
    requests = BATCHES["several"]
    low = running(requests).attention
    assert low is not None and low.tokens == 30 + 120 + 1 + 80 + 100 and low.rows == 119 + 80
    assert [(r.number, r.start, r.whole, r.high) for r in low.requests] == [(1, 30, 120, 1), (3, 151, 380, 0)]
    high = low.high
    assert high is not None and high.requests.tolist() == [0, 1, 2, 4] and high.longest == 100
    assert high.starts.tolist() == [0, 30, 31, 32, 132] and high.whole_starts.tolist() == [0, 80, 200, 401, 511]
    assert high.index.tolist() == [*range(30), 149, 150, *range(231, 331)]
    assert running(BATCHES["too short"]).attention is None
    middle = running(BATCHES["middle chunk"]).attention
    assert middle is not None and middle.high is None
    limits: Callable[..., bool] = LowLimits(5000, 9000).take
    request = RequestRows(2000, 6000, 8000)
    assert limits(request) and not limits(replace(request, new=1000)) and not limits(replace(request, prefix=2999))
    assert not limits(replace(request, prefix=7001)) and limits(replace(request, new=1024))
