"""Prefill attention of gathered keys and values: SGLang's own FlashAttention back end calls it, and gets what it gets
from pages."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.layers import gathered_attention
from mixquant_sglang.layers.gathered_attention import Gathering, Heads, Kernels, gather_attention, heads_of, prepare
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import DECODE_PASS
from mixquant_sglang.versions.attention import flash_attention_3, reads_pages
from tests.support.flash_attention import DIM, HEADS, KV_HEADS, attend, attend_whole, attention, batch
from tests.support.flash_attention import flash_attention_module as flash

__all__ = ["flash"]

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCHES = {
    "one prompt": [RequestRows(60, 0, 60)],
    "prefix": [RequestRows(40, 300, 340)],
    "several": [RequestRows(4, 0, 4), RequestRows(25, 40, 65), RequestRows(1, 9, 4, decoding=True)],
}


def gathering(least: dict[int, int], tokens: int = 600) -> Gathering:
    keys, values = (torch.full((tokens, KV_HEADS * DIM), torch.nan, device=DEVICE).bfloat16() for _ in range(2))
    return Gathering(Heads(HEADS, KV_HEADS, DIM), keys, values, least)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, flash: ModuleType) -> tuple[list[str], Kernels]:
    """Which kernel ran, and the kernels."""
    seen: list[str] = []
    paged, whole = flash_attention_3() if GPU else (attend, attend_whole)

    def named(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            seen.append(name)
            return kernel(*args, **more)

        return call

    kernels = Kernels(named("paged", paged), named("whole", whole))
    monkeypatch.setattr(flash, "flash_attn_with_kvcache", kernels.paged)
    return seen, kernels


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("padding", [None, 0, 5], ids=["eager", "in a graph", "in a graph, padded"])
@pytest.mark.parametrize("name", BATCHES)
def test_the_same_bits_as_from_pages(
    flash: ModuleType, calls: tuple[list[str], Kernels], name: str, padding: int | None, page: int
) -> None:
    """``padding``: rows of a graph's buffers behind those of the pass."""
    seen, kernels = calls
    requests, layer = BATCHES[name], attention()
    whole, gathered = (batch(flash, requests, DEVICE, page) for _ in range(2))
    before, rows = whole.cache, len(whole.rows[0])
    expected = whole.run(layer, DECODE_PASS)
    found = gathering({1: 0})
    assert gather_attention(gathered.backend, found, kernels) == ""
    place = None
    if padding is not None:
        place = torch.full((rows + padding, HEADS * DIM), 7.0, device=DEVICE).bfloat16()
        q, k, v = gathered.rows
        gathered.rows = (torch.cat([q, q[:padding]]), k, v)
    for _ in range(2):  # the second is a pass of its own
        got = gathered.run(layer, DECODE_PASS, place)
    assert seen == ["paged", "whole", "whole"] and found.passes == 2
    assert torch.equal(got[:rows], expected) and len(got) == rows + (padding or 0)
    assert place is None or got.data_ptr() == place.data_ptr()
    assert torch.equal(gathered.cache, whole.cache) and not torch.equal(whole.cache, before)
    assert flash.flash_attn_with_kvcache is kernels.paged


def test_layers_of_one_pass_share_where_the_tokens_lie(
    flash: ModuleType, calls: tuple[list[str], Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    slots_of = gathered_attention.slots_of

    def counted(*args: Any) -> torch.Tensor:
        asked.append(len(args[1]))
        return slots_of(*args)

    monkeypatch.setattr(gathered_attention, "slots_of", counted)
    given = batch(flash, BATCHES["several"], DEVICE)
    found = gathering({1: 0})
    gather_attention(given.backend, found, calls[1])
    layers = [attention() for _ in range(3)]
    for at, layer in enumerate(layers):
        layer.layer_id = at
    for _ in range(2):
        for layer in layers:
            given.run(layer, DECODE_PASS)
    assert asked == [3, 3] and found.passes == 2 and calls[0] == ["whole"] * 6


def test_the_rest_reads_pages(flash: ModuleType, calls: tuple[list[str], Kernels]) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    seen, kernels = calls
    requests, layer = BATCHES["prefix"], attention()

    def given(least: dict[int, int] | None = None, tokens: int = 600) -> Any:
        made = batch(flash, requests, DEVICE)
        gather_attention(made.backend, gathering(least or {1: 0}, tokens), kernels)
        return made

    given({41: 0}).run(layer, DECODE_PASS)  # fewer rows than pay
    given({1: 301}).run(layer, DECODE_PASS)  # a shorter prefix
    given({1: 0, 40: 301}).run(layer, DECODE_PASS)
    given(tokens=339).run(layer, DECODE_PASS)  # more than the scratch takes
    given().run(attention(sliding_window_size=8), DECODE_PASS)
    given().run(attention(is_cross_attention=False, use_irope=True), DECODE_PASS)
    given().run(attention(logit_cap=30.0), DECODE_PASS)  # with which no bits are compared at start
    verify = given()
    verify.facts.forward_mode = ForwardMode.TARGET_VERIFY
    verify.run(layer, DECODE_PASS)
    unknown = given()
    unknown.facts.seq_lens_cpu = None
    unknown.run(layer, DECODE_PASS)
    few = given()
    few.rows = (few.rows[0][-1:], *few.rows[1:])  # as for the last layer's rows that are read
    few.backend.forward_metadata.cu_seqlens_q = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    few.backend.forward_metadata.max_seq_len_q = 1
    few.run(layer, DECODE_PASS)
    sinks = given()
    sinks.backend.forward(*sinks.rows, layer, sinks.facts, sinks=torch.zeros(HEADS, device=DEVICE).bfloat16())
    assert seen == ["paged"] * 11
    given({1: 0, 40: 300}, tokens=340).run(layer, DECODE_PASS)
    assert seen[11:] == ["whole"]


def test_what_did_not_gather_is_not_counted(
    flash: ModuleType, calls: tuple[list[str], Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = batch(flash, BATCHES["prefix"], DEVICE)
    found = gathering({1: 0})
    gather_attention(given.backend, found, Kernels(lambda **call: call["q"], calls[1].whole))
    pool = given.backend.token_to_kv_pool
    with monkeypatch.context() as patch:
        patch.setattr(pool, "buffers", [buffer.half() for buffer in pool.buffers])  # a cache of another dtype
        patch.setattr(pool, "set_kv_buffer", lambda *_: None)
        given.run(attention(), DECODE_PASS)
    assert calls[0] == [] and found.passes == 0
    given.run(attention(), DECODE_PASS)
    assert calls[0] == ["whole"] and found.passes == 1


def test_a_batch_goes_with_its_pass(flash: ModuleType, calls: tuple[list[str], Kernels]) -> None:
    """It has what its images were embedded to, rows x hidden size, among others."""
    given = batch(flash, BATCHES["prefix"], DEVICE)
    gather_attention(given.backend, gathering({1: 0}), calls[1])
    given.run(attention(), DECODE_PASS)
    known = weakref.ref(given.facts)
    given.facts = None
    gc.collect()
    assert calls[0] == ["whole"] and known() is None


def test_an_error_leaves_the_module_as_it_was(flash: ModuleType, calls: tuple[list[str], Kernels]) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("of the kernel")

    given = batch(flash, BATCHES["prefix"], DEVICE)
    gather_attention(given.backend, gathering({1: 0}), Kernels(calls[1].paged, fails))
    with pytest.raises(RuntimeError, match="of the kernel"):
        given.run(attention(), DECODE_PASS)
    assert flash.flash_attn_with_kvcache is calls[1].paged


def test_which_back_ends_are_left_alone(flash: ModuleType) -> None:
    def reason(**changes: object) -> str:
        backend = batch(flash, BATCHES["prefix"], DEVICE).backend
        for name, value in changes.items():
            setattr(backend, name, value)
        return reads_pages(backend)

    assert reason() == reason(kv_cache_dtype_str="bfloat16") == ""
    assert reason(kv_cache_dtype_str="fp8_e4m3") == "its keys and values are fp8_e4m3"
    assert "FlashAttentionBackend 4," in reason(fa_impl_ver=4)
    assert reason(use_mla=True) == "its keys and values are not of plain pages (use_mla)"
    for wrap in (
        lambda backend: SimpleNamespace(full_attn_backend=backend),
        lambda backend: SimpleNamespace(prefill_backend=backend, decode_backend=SimpleNamespace()),
        lambda backend: SimpleNamespace(full_attn_backend=SimpleNamespace(prefill_backend=backend)),
    ):
        backend = batch(flash, BATCHES["prefix"], DEVICE).backend
        assert gather_attention(wrap(backend), gathering({1: 0}), Kernels(attend, attend_whole)) == ""
        assert isinstance(backend.forward_extend, gathered_attention.GatheredExtend)


def test_when_it_pays() -> None:
    """Of several requests as of the one whose attention and whose copy are theirs together."""
    found = gathering({4: 100, 8: 50}, tokens=300)
    assert not found.pays([3], [200]) and found.pays([4], [104]) and not found.pays([4], [103])
    assert found.pays([8], [58]) and not found.pays([7], [58]) and not found.pays([8], [301])
    assert not found.pays([], []) and found.pays([8, 8], [58, 58])
    assert not found.pays([8, 1, 1], [100, 100, 100])  # 3.3 rows behind 300


def test_heads_are_those_of_most_plain_layers() -> None:
    class Model(torch.nn.Module):
        def __init__(self, *layers: torch.nn.Module) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

    plain, window = attention(), attention(sliding_window_size=8)
    assert heads_of(Model(window, window, plain, torch.nn.Identity())) == Heads(HEADS, KV_HEADS, DIM)
    assert heads_of(Model(window)) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by kernel, a new row and token: over pages 1, gathered 1 for 3/4 of it and 200 for each token."""
    monkeypatch.setattr(gathered_attention, "ROWS", (8, 16, 32))
    monkeypatch.setattr(gathered_attention, "PREFIXES", (16, 64, 256))
    times = {"paged": 1.0, "whole": 0.75, "copy": 4.0}

    def seconds(call: Any, _device: torch.device) -> float:
        rows, tokens = call.keywords["max_seqlen_q"], int(call.keywords["cu_seqlens_k_new"][-1])
        if call.func is gathered_attention.attend:
            return rows * tokens * times["whole"] + tokens * times["copy"]
        return rows * tokens * times["paged"]

    monkeypatch.setattr(gathered_attention, "_seconds", seconds)
    return times


def test_where_it_pays_is_measured(clock: dict[str, float]) -> None:
    """0.25 of each row against 4 a token: from 16 rows on it is equal, and from 32 on it pays, however long."""
    heads, kernels = Heads(HEADS, KV_HEADS, DIM), Kernels(attend, attend_whole)
    found = prepare(heads, 288, kernels, torch.device("cpu"))
    assert isinstance(found, Gathering) and found.least == {32: 16}
    assert found.best == (pytest.approx(1 / (0.75 + 4 / 32)), 32, 256)
    assert found.nbytes == 2 * 288 * KV_HEADS * DIM * 2
    assert found.state() == {"passes": 0, "from": {"32": 16}, "scratch_bytes": found.nbytes}
    assert "from 32 rows behind 16 on; scratch 0 MiB" in found.describe()
    clock["copy"] = 8.0
    assert prepare(heads, 288, kernels, torch.device("cpu")) == "it does not pay at any length"
    assert prepare(heads, 20, kernels, torch.device("cpu")) == "sequences are of at most 20 tokens"


def test_other_bits_are_not_taken(clock: dict[str, float]) -> None:
    def one_bit_off(*args: Any, out: torch.Tensor, **more: Any) -> torch.Tensor:
        attend_whole(*args, out=out, **more)
        out.view(torch.int16)[-1, -1, -1] ^= 1
        return out

    heads, device = Heads(HEADS, KV_HEADS, DIM), torch.device("cpu")
    found = prepare(heads, 288, Kernels(attend, one_bit_off), device)
    assert isinstance(found, str) and found.startswith("its bits are others than those of pages, for")


def test_bits_are_compared_and_timed_with_the_pages_of_the_server(clock: dict[str, float]) -> None:
    """A cache whose pages hold 16 tokens goes another way through the kernel than one of single tokens."""
    pages: set[int] = set()

    def paged(**call: Any) -> torch.Tensor:
        pages.add(call["k_cache"].shape[1])
        assert int(call["page_table"].max()) < len(call["k_cache"])
        return attend(**call)

    heads, device = Heads(HEADS, KV_HEADS, DIM), torch.device("cpu")
    found = prepare(heads, 288, Kernels(paged, attend_whole), device, 16)
    assert isinstance(found, Gathering) and pages == {16}


def batches_of(seed: int, tokens: int, rows: int) -> list[list[tuple[int, int]]]:
    """(new rows, all tokens) of requests of many kinds, at most so many together."""
    random = Random(seed)
    found = []
    for _ in range(300):
        lengths: list[tuple[int, int]] = []
        for _ in range(random.choice([1, 1, 2, 5, 17])):
            new = random.choice([1, random.randint(2, rows // 8), random.randint(rows // 8, rows)])
            whole = new + random.choice([0, random.randint(1, tokens // 16), random.randint(tokens // 16, tokens)])
            if sum(n for n, _ in lengths) + new <= rows and sum(w for _, w in lengths) + whole <= tokens:
                lengths.append((new, whole))
        found += [lengths] if lengths else []
    return found


def check_bits(found: Gathering, page: int, kernels: Kernels, device: str, rows: int, least: int = 30) -> None:
    """Of all batches that would be gathered, ``least`` of them or more; FlashAttention splits the keys of those with
    few rows, where pages and gathered keys part."""
    tokens = len(found.keys)
    given = gathered_attention._Paged(found.heads, tokens // page + 64, torch.device(device), page)
    batches = batches_of(found.heads.queries + page, tokens, rows)
    batches = [lengths for lengths in batches if found.pays([n for n, _ in lengths], [w for _, w in lengths])]
    assert len(batches) >= least
    if least >= 30:
        assert any(len(lengths) > 3 for lengths in batches)
        assert any(min(n for n, _ in lengths) == 1 for lengths in batches)
    for n, prefix in found.least.items():
        batches += [[(n, n + prefix)], [(n, tokens)]]
    for lengths in batches:
        call = given.call(lengths)
        gathered = gathered_attention.attend(found, kernels, lengths, **call)
        assert torch.equal(kernels.paged(**call), gathered), (found.heads, page, lengths)


@pytest.mark.parametrize("page", [1, 16])
def test_many_batches_give_the_bits_of_pages(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_attention, "ROWS", (64,))
    heads = Heads(HEADS, KV_HEADS, DIM)
    scratch = [torch.empty(400, KV_HEADS * DIM, dtype=torch.bfloat16) for _ in range(2)]
    check_bits(Gathering(heads, *scratch, {1: 0}), page, Kernels(attend, attend_whole), "cpu", 64)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (64, 8, 128), (4, 1, 128), (8, 1, 128), (16, 2, 256), (64, 8, 64)])
def test_on_the_gpu_many_batches_give_the_bits_of_pages(heads: tuple[int, int, int]) -> None:
    """Few heads, as of one rank of eight, are where FlashAttention splits keys of passes as long as those that are
    timed: there nothing may be gathered."""
    kernels = Kernels(*flash_attention_3())
    found = prepare(Heads(*heads), 60000, kernels, torch.device("cuda"))
    print(heads, found if isinstance(found, str) else found.describe())
    if isinstance(found, str):
        assert heads[1] <= 2 and "bits" in found
        return
    check_bits(found, 1, kernels, "cuda", 8192, least=0)
    found.least = dict.fromkeys(found.least, 0)  # what pays on another day, too
    check_bits(found, 1, kernels, "cuda", 8192, least=30 if min(found.least) <= 2048 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64, 128, 256])
def test_on_the_gpu_bits_of_larger_pages(page: int) -> None:
    """Whether it pays, and gives the same bits at all, is the kernel's to say: where not, nothing is gathered."""
    found = prepare(Heads(32, 8, 128), 45000, Kernels(*flash_attention_3()), torch.device("cuda"), page)
    print(page, found if isinstance(found, str) else found.describe())
    assert isinstance(found, Gathering) or "pay" in found or "bits" in found


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 8, 128), (32, 4, 128), (16, 2, 256)])
def test_on_the_gpu_bits_are_those_of_pages_and_it_pays(heads: tuple[int, int, int]) -> None:
    found = prepare(Heads(*heads), 45000, Kernels(*flash_attention_3()), torch.device("cuda"))
    print(heads, found if isinstance(found, str) else found.describe())
    assert isinstance(found, Gathering) and found.pays([8192], [8192 + 32768])


@pytest.mark.gpu
def test_on_the_gpu_bits_of_few_small_heads_are_those_of_pages() -> None:
    """Their pages cost little: whether it pays at all is the GPU's to say."""
    found = prepare(Heads(8, 4, 64), 45000, Kernels(*flash_attention_3()), torch.device("cuda"))
    assert isinstance(found, Gathering) or found == "it does not pay at any length"
