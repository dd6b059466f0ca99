"""The last layer's attention: only of the queries that somebody looks at."""

from __future__ import annotations

import logging
from typing import Any

from mixquant_sglang.layers.blocks import attention_of, backbone, fusable_method, is_attention
from mixquant_sglang.passes.running import current
from mixquant_sglang.versions.attention import attends_whole, metadata_of_queries

logger = logging.getLogger(__name__)


class ExtendOfReadRows:
    """Takes the place of an attention back end's ``forward_extend``: in layer ``attention``, ``Pass.queries`` alone.

    Keys and values of all rows are written to the cache as ever.  It runs between the segments of captured graphs, or
    in no graph, with the rows of the pass; the rows of the result that nobody reads may hold anything.
    """

    def __init__(self, backend: Any, attention: Any) -> None:
        self._backend = backend
        self._attention = attention
        self._whole = backend.forward_extend
        self._ran = False

    def __call__(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Any:
        queries = current().queries if layer is self._attention and not more else None
        metadata = None
        if queries is not None and len(q) == queries.tokens:
            metadata = metadata_of_queries(self._backend, queries)
        if queries is None or metadata is None:
            return self._whole(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **more)
        backend, out = self._backend, forward_batch._attn_output
        whole_metadata = backend.forward_metadata
        # ``_attn_output``: [T, N], which SGLang has the kernel write to
        backend.forward_metadata, forward_batch._attn_output = metadata, None
        try:
            part = self._whole(
                q.index_select(0, queries.index), k, v, layer, forward_batch, save_kv_cache=save_kv_cache
            )
        finally:
            backend.forward_metadata, forward_batch._attn_output = whole_metadata, out
        out = part.new_empty(len(q), part.shape[1]) if out is None else out.view(len(q), part.shape[1])
        out.index_copy_(0, queries.index, part.to(out.dtype))
        if not self._ran:
            self._ran = True
            logger.info("mixquant: the last layer's attention ran for %d of %d rows", len(part), len(q))
        return out


def prune_last_attention(model: Any, backend: Any) -> str:
    """Lets the attention of a last layer that ``prune_last_layer`` took leave out queries of rows that nobody reads.

    Returns why it cannot, or nothing.
    """
    attention = attention_of(backbone(model).layers[-1])
    o = fusable_method(attention.o_proj)
    if not is_attention(attention) or o is None or o.read_rows is None:
        return "what follows it reads all rows"
    reason = attends_whole(backend, attention.attn)
    if not reason:
        backend.forward_extend = ExtendOfReadRows(backend, attention.attn)
    return reason
