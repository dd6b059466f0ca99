"""The last layer's attention for the rows that are read: SGLang's own FlashAttention back end, and on the CPU the
kernel's mathematics in its place."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import DECODE_PASS, Pass, scope
from mixquant_sglang.recipe.select import Device, select

attends_whole = pytest.importorskip("mixquant_sglang.versions.attention").attends_whole

MODULE = "sglang.srt.layers.attention.flashattention_backend"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
HEADS, KV_HEADS, DIM = 4, 2, 128
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


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    out: torch.Tensor | None,
    **_more: object,
) -> torch.Tensor:
    """FA3's paged varlen attention in float64, q [R, HEADS, DIM]; the last query of a request sees all its keys."""
    starts = cu_seqlens_q.tolist()
    assert starts[0] == 0 and starts[-1] == len(q) and causal and cu_seqlens_q.dtype is torch.int32
    assert max_seqlen_q == max(b - a for a, b in pairwise(starts))
    result = torch.empty_like(q) if out is None else out
    for i, keys in enumerate(cache_seqlens.tolist()):
        slots = page_table[i].long()
        k, v = (cache[slots].flatten(0, 1)[:keys].double() for cache in (k_cache, v_cache))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        rows = q[starts[i] : starts[i + 1]].double()
        seen = torch.ones(len(rows), keys, dtype=torch.bool).tril(keys - len(rows))
        scores = torch.einsum("qhd,khd->hqk", rows, k) * softmax_scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        result[starts[i] : starts[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return result


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """SGLang's module of the back end.  Where there is no GPU it is imported without the kernels, and forgotten with
    what it alone imports."""
    if torch.cuda.is_available():
        yield importlib.import_module(MODULE)
        return
    for name in (
        "sglang.srt.models.qwen3",
        "sglang.srt.layers.attention.base_attn_backend",
        "mixquant_sglang.host.config",
    ):
        importlib.import_module(name)
    known = set(sys.modules)
    kernels = ModuleType("sgl_kernel")
    kernels.__path__ = []
    kernels.merge_state_v2 = None
    sys.modules["sgl_kernel"] = kernels
    try:
        module = importlib.import_module(MODULE)
    finally:
        for name in set(sys.modules) - known:
            del sys.modules[name]
    monkeypatch.setattr(module, "flash_attn_with_kvcache", attend)
    yield module


class Pool:
    """Keys and values of one layer by slot, poisoned where nothing was written."""

    def __init__(self, slots: int, device: str) -> None:
        self.buffers = [torch.full((slots, KV_HEADS, DIM), torch.nan, device=device).bfloat16() for _ in range(2)]

    def set_kv_buffer(self, _layer: object, at: Any, k: torch.Tensor, v: torch.Tensor, *_scales: object) -> None:
        for buffer, rows in zip(self.buffers, (k, v), strict=True):
            buffer[at.loc] = rows

    def get_kv_buffer(self, _layer: int) -> tuple[torch.Tensor, ...]:
        return tuple(self.buffers)


def attention(**changes: object) -> torch.nn.Module:
    from sglang.srt.layers.radix_attention import RadixAttention

    return RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer_id=1, **changes)


@dataclass
class Batch:
    """One extend pass: what a back end is given, with the keys and values of the prefixes in its cache."""

    backend: Any
    facts: Any
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def run(self, layer: torch.nn.Module, running: Pass, output: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.rows
        self.facts._attn_output = output
        with scope(running):
            return self.backend.forward(q, k, v, layer, self.facts)

    @property
    def cache(self) -> torch.Tensor:
        return torch.stack(self.backend.token_to_kv_pool.buffers).nan_to_num(7)


def batch(flash: ModuleType, requests: list[RequestRows], device: str, page: int = 1) -> Batch:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    torch.manual_seed(0)
    lengths = [r.prefix + r.new for r in requests]
    pages = [-(-n // page) for n in lengths]
    order = (torch.randperm(sum(pages)) + 1).split(pages)
    slots = [(o[:, None] * page + torch.arange(page)).flatten()[:n] for o, n in zip(order, lengths, strict=True)]
    pool = Pool((sum(pages) + 1) * page, device)
    for r, at in zip(requests, slots, strict=True):
        for buffer in pool.buffers:
            buffer[at[: r.prefix]] = torch.randn(r.prefix, KV_HEADS, DIM).bfloat16().to(device)

    def starts(counts: list[int]) -> torch.Tensor:
        return torch.tensor([0, *counts]).cumsum(0).int().to(device)

    backend = flash.FlashAttentionBackend.__new__(flash.FlashAttentionBackend)
    absent = ("use_mla", "fa_skip_kv_cache", "kv_cache_is_mxfp8", "has_swa", "has_local_attention")
    fields: dict[str, object] = dict.fromkeys((*absent, "use_sliding_window_kv_pool", "is_encoder_decoder"), False)
    fields |= {"local_attn_builder": None, "full_cg_prefill_metadata": None, "_kv_shard_pool": None}
    fields |= {"fa_impl_ver": 3, "attn_cp_size": 1, "topk": 0, "num_splits": 0, "page_size": page}
    fields |= {"kv_cache_dtype_str": "auto", "kv_cache_dtype": torch.bfloat16, "token_to_kv_pool": pool}
    for name, value in fields.items():
        setattr(backend, name, value)
    backend.forward_metadata = flash.FlashAttentionMetadata(
        cache_seqlens_int32=torch.tensor(lengths, dtype=torch.int32, device=device),
        max_seq_len_q=max(r.new for r in requests),
        max_seq_len_k=max(lengths),
        cu_seqlens_q=starts([r.new for r in requests]),
        cu_seqlens_k=starts(lengths),
        page_table=torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True).int().to(device),
    )
    facts = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(requests),
        input_ids=None,
        attn_cp_metadata=None,
        out_cache_loc=torch.cat([at[r.prefix :] for r, at in zip(requests, slots, strict=True)]).to(device),
        out_cache_loc_is_physical=True,
        _attn_output=None,
    )
    new = sum(r.new for r in requests)
    shapes = ((new, HEADS * DIM), (new, KV_HEADS, DIM), (new, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape).bfloat16().to(device) for shape in shapes)
    return Batch(backend, facts, (q, k, v))


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
