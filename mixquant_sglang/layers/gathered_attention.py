"""Prefill attention behind long prefixes, of keys and values gathered out of their pages: the same bits, sooner.

FlashAttention 3 reads pages of one token with loads of single rows; keys and values that lie one behind the other it
reads in tiles.  Whether the results are the same to the last bit, and from how many new rows behind how long a prefix
the copy pays for itself, is seen at start with the heads of the model that is served; without the former nothing is
gathered.  It is no low precision: every recipe has it, ``bf16`` too.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from mixquant_sglang.kernels.limits import GATHERED_BYTES as SCRATCH_BYTES
from mixquant_sglang.kernels.limits import GATHERED_GAIN as GAIN
from mixquant_sglang.kernels.limits import GATHERED_PREFIXES as PREFIXES
from mixquant_sglang.kernels.limits import GATHERED_ROWS as ROWS
from mixquant_sglang.kernels.tuning.timing import least
from mixquant_sglang.versions.attention import (
    attends_plainly,
    extend_namespace,
    instead_of_pages,
    prefill_part,
    reads_pages,
)

MODES = ("EXTEND", "MIXED")


@dataclass(frozen=True)
class Heads:
    """Of one rank's attention: heads of queries, of keys and values, elements of each."""

    queries: int
    keys: int
    size: int

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values together, BF16."""
        return 4 * self.keys * self.size


@dataclass(frozen=True)
class Kernels:
    """SGLang's two calls of FlashAttention 3: over pages (``flash_attn_with_kvcache``), and over whole keys and values
    (``flash_attn_varlen_func``)."""

    paged: Callable[..., Any]
    whole: Callable[..., Any]


@dataclass
class Gathering:
    """``keys``, ``values``: [tokens, heads * size] BF16, scratch of one layer.  ``least``: by new rows, the shortest
    prefix behind which gathering pays; a pass takes the row of its own number or the next lower one.  ``passes``:
    that ran with it."""

    heads: Heads
    keys: torch.Tensor
    values: torch.Tensor
    least: dict[int, int]
    best: tuple[float, int, int] = (1.0, 0, 0)  # how much sooner, of how many rows behind how many tokens
    passes: int = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def pays(self, new: Sequence[int], whole: Sequence[int]) -> bool:
        """For requests of so many new rows each, of ``whole`` tokens with their prefixes.

        Attention takes new x whole of each, the copy the sum of whole: both are those of one request of ``rows``."""
        tokens = sum(whole)
        if tokens > len(self.keys) or not tokens:
            return False
        rows = sum(n * w for n, w in zip(new, whole, strict=True)) / tokens
        known = [n for n in self.least if n <= rows]
        return bool(known) and tokens - rows >= self.least[max(known)]

    def state(self) -> dict[str, Any]:
        """Builtin types only."""
        return {"passes": self.passes, "from": {str(n): p for n, p in self.least.items()}, "scratch_bytes": self.nbytes}

    def describe(self) -> str:
        times, rows, prefix = self.best
        ranges = ", ".join(f"{rows} rows behind {prefix}" for rows, prefix in self.least.items())
        return (
            f"attention of long prefills reads gathered keys and values (the same bits; {times:.2f}x at {rows} rows "
            f"behind {prefix} tokens) from {ranges} on; scratch {self.nbytes / 2**20:.0f} MiB"
        )


def prepare(heads: Heads, tokens: int, kernels: Kernels, device: torch.device, page: int = 1) -> Gathering | str:
    """Scratch for up to ``tokens`` keys out of pages of ``page`` tokens, and where it pays; why it does not, where it
    never does or gives other bits.

    Call it before the KV cache is sized: the scratch stays."""
    tokens = min(tokens, SCRATCH_BYTES // heads.bytes_per_token)
    cells = [(rows, prefix) for rows in ROWS for prefix in PREFIXES if rows + prefix <= tokens]
    if not cells:
        return f"sequences are of at most {tokens} tokens"
    scratch = [torch.empty(tokens, heads.keys * heads.size, dtype=torch.bfloat16, device=device) for _ in range(2)]
    gathering = Gathering(heads, scratch[0], scratch[1], {})
    # several requests, a decode row among them; no prefix; the shortest and the longest that are timed
    compared = [[(3, 700), (1500, 4500), (1, 3000)], [(1024, 1024)], [min(cells)], [max(cells)], [max(cells, key=sum)]]
    batches = [[(new, new + prefix) for new, prefix in requests] for requests in compared]
    batches = [lengths for lengths in batches if sum(whole for _, whole in lengths) <= tokens]
    paged = _Paged(heads, max(sum(_pages(lengths, page)) for lengths in batches), device, page)
    for lengths in batches:
        call = paged.call(lengths)
        if not torch.equal(kernels.paged(**call), attend(gathering, kernels, lengths, **call)):
            return f"its bits are others than those of pages, for (new rows, all tokens) {lengths}"
    for rows in ROWS:
        gains = {}
        for prefix in (prefix for r, prefix in cells if r == rows):
            lengths = [(rows, rows + prefix)]
            call = paged.call(lengths)
            over_pages = _seconds(partial(kernels.paged, **call), device)
            gains[prefix] = over_pages / _seconds(partial(attend, gathering, kernels, lengths, **call), device)
        paying = [*reversed([*_while_paying(reversed(gains.items()))])]
        if paying:
            gathering.least[rows] = paying[0][0]
            gathering.best = max(gathering.best, *((gain, rows, prefix) for prefix, gain in paying))
    return gathering if gathering.least else "it does not pay at any length"


def _while_paying(gains: Any) -> Iterator[tuple[int, float]]:
    """From the longest prefix down to the last that pays without a gap."""
    for prefix, gain in gains:
        if gain < GAIN:
            return
        yield prefix, gain


def attend(
    gathering: Gathering,
    kernels: Kernels,
    lengths: Sequence[tuple[int, int]],
    *,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k_new: torch.Tensor,
    max_seqlen_q: int,
    out: torch.Tensor | None = None,
    cache_seqlens: Any = None,
    slots: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    """What ``kernels.paged`` returns for the same arguments, [rows, heads, size]; ``lengths``: new rows and all tokens
    of each request.  ``slots``: of the cache, [tokens], as ``slots_of`` gives them."""
    del cache_seqlens  # the same numbers as in lengths and cu_seqlens_k_new
    tokens, rows = sum(whole for _, whole in lengths), min(len(q), sum(new for new, _ in lengths))
    if slots is None:
        slots = slots_of(page_table, [whole for _, whole in lengths], k_cache.shape[1])
    whole = []
    for cache, scratch in ((k_cache, gathering.keys), (v_cache, gathering.values)):
        heads = cache.shape[2:]
        part = scratch[:tokens]
        torch.index_select(cache.view(-1, heads.numel()), 0, slots, out=part)
        whole.append(part.view(tokens, *heads))
    if out is None:
        out = torch.empty_like(q)
    kernels.whole(
        q[:rows],
        *whole,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max(whole for _, whole in lengths),
        out=out[:rows],
        **more,
    )
    return out


def slots_of(page_table: torch.Tensor, lengths: Sequence[int], page_size: int) -> torch.Tensor:
    """``page_table``: [requests, pages], int32.  Returns [sum of lengths], int32: where each token lies."""
    rows = []
    for pages, length in zip(page_table, lengths, strict=False):
        if page_size > 1:
            first = pages[: -(-length // page_size), None] * page_size
            pages = (first + torch.arange(page_size, dtype=first.dtype, device=first.device)).flatten()
        rows.append(pages[:length])
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class GatheredExtend:
    """Takes the place of an attention back end's ``forward_extend``: the call of FlashAttention over pages becomes one
    over gathered keys and values, where ``Gathering.pays``.  All else is SGLang's, the writing of the cache too."""

    def __init__(self, backend: Any, gathering: Gathering, kernels: Kernels) -> None:
        self.whole = backend.forward_extend
        self._names = extend_namespace(backend)
        self._gathering = gathering
        self._kernels = kernels
        self._plain: dict[int, bool] = {}  # by layer
        self._batch: Callable[[], Any] = _nothing  # a weak reference: it has embeddings of images, and more
        self._layer = -1
        self._lengths: list[tuple[int, int]] = []  # of the running pass; empty: not gathered
        self._slots: torch.Tensor | None = None

    def __call__(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Any:
        if any(value is not None for value in more.values()) or not self._gathers(q, layer, forward_batch):
            return self.whole(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)
        with instead_of_pages(self._names, self._attend):
            return self.whole(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)

    def _gathers(self, q: Any, layer: Any, forward_batch: Any) -> bool:
        if forward_batch.forward_mode.name not in MODES:
            return False
        plain = self._plain.get(layer.layer_id)
        if plain is None:
            heads = Heads(layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim)
            plain = heads == self._gathering.heads and layer.v_head_dim == heads.size and attends_plainly(layer)
            self._plain[layer.layer_id] = plain
        if not plain:
            return False
        if forward_batch is not self._batch() or layer.layer_id <= self._layer:  # another pass
            self._begin(forward_batch)
        self._layer = layer.layer_id
        # fewer rows: the last layer's, of those that somebody reads
        return bool(self._lengths) and len(q) >= sum(new for new, _ in self._lengths)

    def _begin(self, forward_batch: Any) -> None:
        self._batch, self._slots, self._lengths = weakref.ref(forward_batch), None, []
        new, whole = forward_batch.extend_seq_lens_cpu, forward_batch.seq_lens_cpu
        if new is None or whole is None:
            return
        lengths = [*zip(map(int, new), map(int, whole), strict=True)]
        if self._gathering.pays([n for n, _ in lengths], [w for _, w in lengths]):
            self._lengths = lengths

    def _attend(self, *, ver: int, return_softmax_lse: bool = False, **call: Any) -> torch.Tensor:
        if ver != 3 or return_softmax_lse or call["k_cache"].dtype != torch.bfloat16:
            return self._kernels.paged(ver=ver, return_softmax_lse=return_softmax_lse, **call)  # type: ignore[no-any-return]
        if self._slots is None:
            whole = [whole for _, whole in self._lengths]
            self._slots = slots_of(call["page_table"], whole, call["k_cache"].shape[1])
            self._gathering.passes += 1
        return attend(self._gathering, self._kernels, self._lengths, slots=self._slots, **call)


def _nothing() -> None:
    """Of no pass."""


def heads_of(model: torch.nn.Module) -> Heads | None:
    """Of the plain attention layers (causal, keys and values of one size) that the model has most of."""
    found: Counter[Heads] = Counter()
    module: Any
    for module in model.modules():
        if attends_plainly(module) and module.head_dim == module.v_head_dim:
            found[Heads(module.tp_q_head_num, module.tp_k_head_num, module.head_dim)] += 1
    return found.most_common(1)[0][0] if found else None


def gather_attention(backend: Any, gathering: Gathering, kernels: Kernels) -> str:
    """Lets ``backend`` gather; returns why it cannot, or nothing."""
    backend = prefill_part(backend)
    reason = reads_pages(backend)
    if not reason:
        backend.forward_extend = GatheredExtend(backend, gathering, kernels)
    return reason


# -- what is timed -----------------------------------------------------------------------------------------------------


class _Paged:
    """Random keys and values of up to ``pages`` pages of ``page`` tokens, in an order of their own."""

    def __init__(self, heads: Heads, pages: int, device: torch.device, page: int) -> None:
        self._heads = heads
        self._device = device
        self._page = page
        seed = torch.Generator(device).manual_seed(0)
        random = partial(torch.randn, dtype=torch.bfloat16, device=device, generator=seed)
        self._cache = [random(pages, page, heads.keys, heads.size) for _ in range(2)]
        self._queries = random(max(ROWS), heads.queries, heads.size)
        self._order = torch.randperm(pages, device=device, generator=seed).int()

    def call(self, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
        def starts(numbers: Sequence[int]) -> torch.Tensor:
            return torch.tensor([0, *accumulate(numbers)], dtype=torch.int32, device=self._device)

        new, whole, pages = [n for n, _ in lengths], [w for _, w in lengths], _pages(lengths, self._page)
        table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=self._device)
        for row, start, count in zip(table, accumulate([0, *pages]), pages, strict=False):
            row[:count] = self._order[start : start + count]
        return {
            "q": self._queries[: sum(new)],
            "k_cache": self._cache[0],
            "v_cache": self._cache[1],
            "page_table": table,
            "cache_seqlens": torch.tensor(whole, dtype=torch.int32, device=self._device),
            "cu_seqlens_q": starts(new),
            "cu_seqlens_k_new": starts(whole),
            "max_seqlen_q": max(new),
            "softmax_scale": self._heads.size**-0.5,
            "causal": True,
            "num_splits": 0,
        }


def _pages(lengths: Sequence[tuple[int, int]], page: int) -> list[int]:
    """Of each request."""
    return [-(-whole // page) for _, whole in lengths]


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    call()

    def sample() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize(device)
        return float(began.elapsed_time(ended)) / 1e3

    return least(sample)
