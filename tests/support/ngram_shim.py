"""A plugin for tests: NGRAM without a GPU, for chains of drafted tokens, greedy.

SGLang's own code for that is in a build of sgl-kernel for CPUs with AMX; its attention for other CPUs knows nothing of
verification.  In its place here: plain torch for four kernels, lengths of drafted rows for attention, and a table in
place of the trie, which a thread of its own fills.  ``tests/e2e/test_ngram_on_cpu.py`` writes it down as a plugin.
"""

import sys
import types


def register():
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if torch.cuda.is_available():
        return
    import sglang.srt.layers.rotary_embedding.base as rotary

    rotary._is_cpu = True
    native = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend"
    HookRegistry.register("sglang.srt.speculative.spec_info.SpeculativeAlgorithm.create_worker", shim, HookType.BEFORE)
    HookRegistry.register(native, attend, HookType.AROUND)
    pool = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup"
    HookRegistry.register(pool, lambda _original, _pool: None, HookType.AROUND)


def shim(*_args):
    for name in ("sgl_kernel", "sgl_kernel.speculative"):
        module = types.ModuleType(name)
        module.reconstruct_indices_from_tree_mask = links
        module.__path__ = []
        sys.modules.setdefault(name, module)
    from sglang.srt.mem_cache import allocation
    from sglang.srt.speculative import eagle_utils, ngram_worker

    for name in ("reconstruct_indices_from_tree_mask", "reconstruct_indices_from_tree_mask_func"):
        if hasattr(ngram_worker, name):
            setattr(ngram_worker, name, links)
    allocation.assign_req_to_token_pool_func = take_slots
    ngram_worker.assign_extend_cache_locs_func = slots
    ngram_worker.move_accept_tokens_to_target_kvcache = in_place
    ngram_worker.NgramCorpus = Table
    eagle_utils.verify_tree_greedy_func = verify


def links(tree_mask, seq_lens, positions, index, next_token, next_sibling, batch_size, drafted):
    """Of chains: each token's parent is the one before it."""
    import torch

    places = torch.arange(drafted)
    assert torch.equal(
        tree_mask.view(batch_size, drafted, drafted), (places[:, None] >= places).expand(batch_size, -1, -1)
    )
    positions.copy_((seq_lens[:, None] + places).flatten())
    index.copy_(torch.arange(batch_size * drafted).view(batch_size, drafted))
    next_token.copy_(torch.where(places + 1 < drafted, places + 1, -1).expand(batch_size, -1))
    next_sibling.fill_(-1)


def slots(req_pool_indices, req_to_token, start_offset, end_offset, **_kwargs):
    import torch

    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    return torch.cat([req_to_token[row, start:end] for row, start, end in rows]).to(torch.int64)


def take_slots(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, *_):
    done = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[done : done + end - start].to(req_to_token.dtype)
        done += end - start


def in_place(_batch, accept_index, _correct, _allocator):
    """Of a chain KV is where it belongs."""
    for row in accept_index.tolist():
        taken = [index for index in row if index >= 0]
        assert taken == list(range(taken[0], taken[0] + len(taken))), row


def verify(predicts, accept_index, accept_token_num, candidates, target_predict, **_kwargs):
    drafted = candidates.shape[1]
    for b, (tokens, wanted) in enumerate(zip(candidates.tolist(), target_predict.tolist(), strict=True)):
        taken = 0
        while taken + 1 < drafted and tokens[taken + 1] == wanted[taken]:
            taken += 1
        for i in range(taken + 1):
            accept_index[b, i] = b * drafted + i
            predicts[b * drafted + i] = wanted[i]
        accept_token_num[b] = taken
    return predicts, accept_index, accept_token_num


def attend(original, backend, q, k, v, layer, forward_batch, *args, **kwargs):
    import torch

    if not forward_batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, forward_batch, *args, **kwargs)
    given = forward_batch.seq_lens, forward_batch.extend_prefix_lens, forward_batch.extend_seq_lens
    drafted = len(q) // len(given[0])
    forward_batch.extend_prefix_lens = given[0]
    forward_batch.extend_seq_lens = torch.full_like(given[0], drafted)
    forward_batch.seq_lens = given[0] + drafted
    try:
        return original(backend, q, k, v, layer, forward_batch, *args, **kwargs)
    finally:
        forward_batch.seq_lens, forward_batch.extend_prefix_lens, forward_batch.extend_seq_lens = given


class Table:
    """What followed a pair of tokens the last time."""

    def __init__(self, *, draft_token_num, **_kwargs):
        self.drafted, self.after = draft_token_num, {}

    def batch_put(self, texts):
        for text in texts:
            self.after.update({(a, b): c for a, b, c in zip(text, text[1:], text[2:], strict=False)})

    def batch_get(self, _ids, texts, _lengths=None):
        import numpy as np

        chains = []
        for text in texts:
            chain = list(text[-2:])
            while len(chain) < self.drafted + 1:
                chain.append(self.after.get((chain[-2], chain[-1]), chain[-2]))
            chains += chain[1:]
        mask = np.tril(np.ones((self.drafted, self.drafted), dtype=bool))
        return np.array(chains, dtype=np.int64), np.stack([mask] * len(texts)).flatten()

    def synchronize(self):
        pass

    def erase_match_state(self, _ids):
        pass

    def reset(self):
        self.after.clear()
