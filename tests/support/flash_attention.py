"""SGLang's own FlashAttention back end over a small cache; on the CPU with the kernels' mathematics in their place."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import Pass, scope

MODULE = "sglang.srt.layers.attention.flashattention_backend"
HEADS, KV_HEADS, DIM = 4, 2, 128


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
    out: torch.Tensor | None = None,
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


def attend_whole(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    out: torch.Tensor,
    **more: Any,
) -> torch.Tensor:
    """FA3's varlen attention by way of ``attend``; k and v: [tokens, KV_HEADS, DIM]."""
    lengths = cu_seqlens_k.diff()
    assert len(k) == len(v) == int(cu_seqlens_k[-1]) and max_seqlen_k == int(lengths.max())
    places = torch.arange(len(k)).split(lengths.tolist())
    table = torch.nn.utils.rnn.pad_sequence([*places], batch_first=True).int()
    caches = (x.unsqueeze(1) for x in (k, v))
    return attend(q, *caches, table, lengths, cu_seqlens_q, max_seqlen_q, out=out, **more)


@pytest.fixture(name="flash")
def flash_attention_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
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


class Facts(SimpleNamespace):
    """As a ``ForwardBatch``, it may be referred to weakly."""


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
    facts = Facts(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(requests),
        input_ids=None,
        attn_cp_metadata=None,
        out_cache_loc=torch.cat([at[r.prefix :] for r, at in zip(requests, slots, strict=True)]).to(device),
        out_cache_loc_is_physical=True,
        extend_seq_lens_cpu=[r.new for r in requests],
        seq_lens_cpu=torch.tensor(lengths),
        _attn_output=None,
    )
    new = sum(r.new for r in requests)
    shapes = ((new, HEADS * DIM), (new, KV_HEADS, DIM), (new, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape).bfloat16().to(device) for shape in shapes)
    return Batch(backend, facts, (q, k, v))
