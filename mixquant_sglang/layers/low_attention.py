"""Prefill attention of long prompts in FP8: instead of SGLang's call of FlashAttention 3, or behind its torch_native.

Keys and values are written to the BF16 cache as ever.  Of each request that ``Pass.attention`` names, all new rows run
in FP8 (``low_scratch.py``; ``kernels/attention.py`` where it is emulated), one request at a time, so that no bit of a
row depends on its neighbours; then the protected rows, and all rows of other requests, run in BF16 over the cache.

The first pass of each layer runs in BF16 as well.  Where FP8 comes out too far from it, the layer stays BF16 for good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mixquant_sglang.kernels.attention import attend_emulated
from mixquant_sglang.layers.gathered_attention import MODES, GatheredExtend, Heads, Kernels, slots_of
from mixquant_sglang.layers.low_scratch import LowScratch
from mixquant_sglang.passes.attention import HighRows, LowRequest, LowRows
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe.text import some
from mixquant_sglang.versions.attention import (
    cached_keys,
    extend_namespace,
    instead_of_pages,
    is_attention_layer,
    is_plain_pass,
    is_torch_native,
    prefill_part,
    reads_pages,
    slots_of_request,
    why_special,
)

logger = logging.getLogger(__name__)

MOST_ERROR = 0.15  # relative RMS of a layer's low rows against BF16 attention
NATIVE, EMULATED = "native", "emulated"


@dataclass
class LowAttention:
    """``sample``: tokens that means and scales are taken from; ``layers``: id -> name of the module, of those that run
    in FP8; ``stays_bf16``: reason -> names of the others; ``count``: told the low rows of each pass; ``emptied``: told
    when the last layer went to BF16."""

    kernel: str
    sample: int
    tokens: int  # of a request, from which on it takes this
    verify: bool = True
    scratch: LowScratch | None = None
    layers: dict[int, str] = field(default_factory=dict)
    stays_bf16: dict[str, list[str]] = field(default_factory=dict)
    count: Callable[[int], None] = lambda _: None
    emptied: Callable[[], None] = lambda: None
    _checked: set[int] = field(default_factory=set)
    _counted: LowRows | None = None

    def leave(self, layer_ids: Sequence[int], reason: str) -> None:
        """To BF16."""
        names = [name for layer_id in layer_ids if (name := self.layers.pop(layer_id, None)) is not None]
        if names:
            self.stays_bf16.setdefault(reason, []).extend(names)
            logger.warning("mixquant: attention stays BF16 (%s): %s", reason, some(names))
            if not self.layers:
                self.emptied()

    def rows_of(self, layer: Any, q: Any, forward_batch: Any) -> LowRows | None:
        """The low rows of the running pass in ``layer``; None if it has none, or not these."""
        rows = current().attention
        if rows is None or layer.layer_id not in self.layers or forward_batch.forward_mode.name not in MODES:
            return None
        return rows if len(q) >= rows.tokens else None  # fewer: the last layer's, of those that somebody reads

    def ran(self, rows: LowRows) -> None:
        if rows is not self._counted:
            self._counted = rows
            self.count(rows.rows)

    def accept(self, layer_id: int, rows: LowRows, low: torch.Tensor, high: torch.Tensor) -> bool:
        """Whether ``low`` is near ``high``, the same rows of BF16 attention; looks at a layer's first pass."""
        self._checked.add(layer_id)
        of_requests = [(low[r.low].float(), high[r.low].float()) for r in rows.requests]
        error = sum(float((a - b).square().sum()) for a, b in of_requests)
        size = sum(float(b.square().sum()) for _, b in of_requests)
        if error <= MOST_ERROR**2 * size:
            return True
        of_size = (error / size) ** 0.5 if size else float("inf")
        self.leave([layer_id], f"FP8 is {100 * of_size:.0f}% off BF16 attention in its first pass")
        return False

    def checks(self, layer_id: int) -> bool:
        return self.verify and layer_id not in self._checked

    def state(self) -> dict[str, Any]:
        """Builtin types only."""
        left = sum(len(names) for names in self.stays_bf16.values())
        return {
            "precision": "fp8",
            "kernel": self.kernel,
            "from": self.tokens,
            "layers": {"fp8": len(self.layers), "bf16": left},
            "stays_bf16": {reason: some(names) for reason, names in self.stays_bf16.items()},
            "scratch_bytes": self.scratch.nbytes if self.scratch else 0,
        }


def find_layers(model: torch.nn.Module, heads: Heads | None, low: LowAttention) -> None:
    """Sorts the attention layers of ``model`` into those that run in FP8, of ``heads``, and the others."""
    module: Any
    for name, module in model.named_modules():
        if not is_attention_layer(module):
            continue
        reason = why_special(module)
        own = Heads(module.tp_q_head_num, module.tp_k_head_num, module.head_dim)
        if not reason and module.v_head_dim != own.size:
            reason = "latent attention, whose values are of another size than its keys"
        elif not reason and own != heads:
            reason = "its heads are others than those of most layers"
        if reason:
            low.stays_bf16.setdefault(reason, []).append(name)
        else:
            low.layers[module.layer_id] = name


class LowExtend:
    """Takes the place of FA3's ``forward_extend``."""

    def __init__(self, backend: Any, low: LowAttention, scratch: LowScratch, kernels: Kernels) -> None:
        below = backend.forward_extend
        self._below = below  # of passes without low rows
        self._whole = below.whole if isinstance(below, GatheredExtend) else below
        self._names = extend_namespace(backend)
        self._backend = backend
        self._low = low
        self._scratch = scratch
        self._kernels = kernels
        self._rows: LowRows | None = None
        self._slots: list[torch.Tensor] = []  # of each low request of the running pass
        self._high: dict[str, Any] = {}  # what the call for the other rows has in place of all rows'

    def __call__(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: object
    ) -> Any:
        rows = self._low.rows_of(layer, q, forward_batch)
        given = [name for name, value in more.items() if value is not None]
        if rows is not None and given:
            self._low.leave([layer.layer_id], f"it takes {', '.join(given)}")
        if rows is None or given or not is_plain_pass(self._backend):
            return self._below(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)
        with instead_of_pages(self._names, partial(self._attend, layer.layer_id, rows)):
            return self._whole(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)

    def _attend(self, layer_id: int, rows: LowRows, **call: Any) -> torch.Tensor:
        paged = self._kernels.paged
        if call["ver"] != 3 or call.get("return_softmax_lse") or call["k_cache"].dtype != torch.bfloat16:
            return paged(**call)  # type: ignore[no-any-return]
        if not all(map(torch.Tensor.is_contiguous, (call["k_cache"], call["v_cache"]))):
            self._low.leave([layer_id], "its keys and values do not lie one behind the other in the cache")
            return paged(**call)  # type: ignore[no-any-return]
        if rows is not self._rows:
            self._begin(rows, call)
        q = call["q"]
        out = torch.empty_like(q) if call.get("out") is None else call["out"]
        cache = _whole_cache(call["k_cache"]), _whole_cache(call["v_cache"])
        for request, slots in zip(rows.requests, self._slots, strict=True):
            new = slice(request.start, request.start + request.new)
            scaling = call["softmax_scale"]
            self._scratch.attend(
                self._kernels.whole, q[new], cache, slots, out[new], scaling=scaling, sample=self._low.sample
            )
        if self._low.checks(layer_id):
            high = paged(**call | {"out": None})
            if not self._low.accept(layer_id, rows, out, high):
                return out.copy_(high)
        self._low.ran(rows)
        if rows.high is not None:
            part = paged(**call | self._high | {"q": q.index_select(0, rows.high.index), "out": None})
            out.index_copy_(0, rows.high.index, part)
        return out

    def _begin(self, rows: LowRows, call: dict[str, Any]) -> None:
        self._rows, table, page = rows, call["page_table"], call["k_cache"].shape[1]
        # copies: where a table's row begins, Triton would compile another kernel
        self._slots = [slots_of(table[r.number : r.number + 1], [r.whole], page).clone() for r in rows.requests]
        self._high = {} if rows.high is None else _arguments(rows.high, call)


def _whole_cache(pages: torch.Tensor) -> torch.Tensor:
    """[pages, size, heads, elements] -> [slots, heads, elements]."""
    return pages.flatten(0, 1)


def _arguments(high: HighRows, call: dict[str, Any]) -> dict[str, Any]:
    return {
        "page_table": call["page_table"].index_select(0, high.requests),
        "cache_seqlens": call["cache_seqlens"].index_select(0, high.requests),
        "cu_seqlens_q": high.starts,
        "cu_seqlens_k_new": high.whole_starts,
        "max_seqlen_q": high.longest,
    }


class EmulatedExtend:
    """Takes the place of torch_native's ``forward_extend``, which runs first, in BF16 and for all rows."""

    def __init__(self, backend: Any, low: LowAttention) -> None:
        self._whole = backend.forward_extend
        self._backend = backend
        self._low = low

    def __call__(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True) -> Any:
        high = self._whole(q, k, v, layer, forward_batch, save_kv_cache)
        rows = self._low.rows_of(layer, q, forward_batch)
        if rows is None:
            return high
        queries = q.view(len(q), layer.tp_q_head_num, layer.qk_head_dim)
        low = torch.clone(high)
        for request in rows.requests:
            part = self._attend(queries[request.start :][: request.new], layer, forward_batch, request)
            low[request.low] = part[: request.new - request.high].flatten(1)
        if self._low.checks(layer.layer_id) and not self._low.accept(layer.layer_id, rows, low, high):
            return high
        self._low.ran(rows)
        return low

    def _attend(self, q: torch.Tensor, layer: Any, forward_batch: Any, request: LowRequest) -> torch.Tensor:
        slots = slots_of_request(self._backend, forward_batch, request.number, request.whole)
        keys, values = (cache[slots] for cache in cached_keys(self._backend, layer.layer_id))
        return attend_emulated(q, keys, values, scaling=layer.scaling, tokens=self._low.sample)


def lower_attention(backend: Any, low: LowAttention, kernels: Kernels | None) -> str:
    """Lets ``backend`` run attention in FP8, with FA3's ``kernels`` or emulated; returns why it cannot, or nothing."""
    backend = prefill_part(backend)
    if low.scratch is None or kernels is None:
        if not is_torch_native(backend):
            return f"the attention back end is {type(backend).__name__}, not SGLang's torch_native"
        backend.forward_extend = EmulatedExtend(backend, low)
        return ""
    reason = reads_pages(backend)
    if not reason:
        backend.forward_extend = LowExtend(backend, low, low.scratch, kernels)
    return reason
