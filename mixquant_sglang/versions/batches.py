"""Batches: how large they get, and how one is built without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mixquant_sglang.versions.dialect import dialect


def most_prefill_rows(model_runner: Any) -> int:
    """Token rows of the largest prefill pass that the scheduler makes."""
    args = model_runner.server_args
    chunk = args.chunked_prefill_size
    return int(chunk if chunk is not None and chunk > 0 else args.max_prefill_tokens)


def prefill_batch(prompts: list[tuple[Any, int]], model_runner: Any) -> tuple[Any, Any]:
    """(ScheduleBatch, ForwardBatch) of an extend pass over the first rows of each prompt: (token ids, rows).

    As ``sglang.benchmark.one_batch.extend`` builds it, whose stand-in for the radix cache it takes.  With DP attention
    a collective of all ranks, each of which comes with a batch.
    """
    from sglang.benchmark.one_batch import TreeCacheNamespace, _maybe_prepare_mlp_sync_batch
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    requests = []
    for i, (ids, new) in enumerate(prompts):
        req = Req(str(i), "", ids, SamplingParams(temperature=0, max_new_tokens=8))
        req.full_untruncated_fill_ids = req.origin_input_ids
        req.logprob_start_len = -1
        dialect().set_first_chunk(req, new)
        requests.append(req)
    batch = ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=model_runner.req_to_token_pool,
        token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        tree_cache=TreeCacheNamespace(
            page_size=model_runner.token_to_kv_pool_allocator.page_size,
            device=model_runner.device,
            token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        ),
        model_config=model_runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    _maybe_prepare_mlp_sync_batch(batch, model_runner)
    if batch.input_ids is None and getattr(batch, "prefill_input_ids_cpu", None) is not None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    return batch, ForwardBatch.init_new(batch, model_runner, return_hidden_states_before_norm=False)


def decode_batch(batch: Any, model_runner: Any) -> Any:
    """The ForwardBatch of a decode step after ``batch``: token 1 for each request, nothing sampled."""
    import torch
    from sglang.benchmark.one_batch import _maybe_prepare_mlp_sync_batch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    batch.input_ids = torch.ones(len(batch.reqs), dtype=torch.int64, device=batch.device)
    batch.prepare_for_decode()
    _maybe_prepare_mlp_sync_batch(batch, model_runner)
    return ForwardBatch.init_new(batch, model_runner, return_hidden_states_before_norm=False)


class Pools:
    """A model runner's pools of requests and of KV, before the first request."""

    def __init__(self, model_runner: Any) -> None:
        self._pools = model_runner.req_to_token_pool, model_runner.token_to_kv_pool_allocator

    @property
    def free_tokens(self) -> int:
        return int(self._pools[1].available_size())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Gives back what was taken; raises ``RuntimeError`` if the pools are then not what they were."""
        before = [pool.available_size() for pool in self._pools]
        try:
            yield
        finally:
            for pool in self._pools:
                pool.clear()
        after = [pool.available_size() for pool in self._pools]
        if after != before:
            raise RuntimeError(f"mixquant: running a tiny prompt left the pools with {after} free instead of {before}")
