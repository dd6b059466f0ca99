"""A plugin for tests: ranks of one model on a CPU, over gloo, where SGLang reaches for CUDA whatever the device.

It builds NCCL's communicators for each group, rows are copied among those of all ranks by a Triton kernel, and their
numbers go through pinned memory.  Its attention for CPUs does not say how long a sequence is that pads a batch.
"""

from functools import partial


def register():
    import torch

    if torch.cuda.is_available():
        return
    import sglang.srt.layers.rotary_embedding.base as rotary

    rotary._is_cpu = True
    over_gloo()


def over_gloo():
    import torch
    from sglang.srt.distributed import parallel_state
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    TorchNativeAttnBackend.get_cuda_graph_seq_len_fill_value = lambda _self: 1
    parallel_state.init_model_parallel_group = partial(parallel_state.init_model_parallel_group, use_pynccl=False)
    group = parallel_state.GroupCoordinator  # whose operators are registered for CUDA alone
    group.all_gather_into_tensor = group._all_gather_into_tensor
    group.reduce_scatter_tensor = group._reduce_scatter_tensor
    dp_attention.memcpy_triton = dp_attention.memcpy_func = copy_rows  # 0.5.17, 0.5.23
    torch.tensor = partial(unpinned, torch.tensor)


def copy_rows(dst, src, dim, offset, sz, offset_src):
    """``sz`` rows: to ``dst`` from row ``offset`` of ``src``, or from ``src`` to row ``offset`` of ``dst``."""
    first, rows = int(offset), min(int(sz), len(dst), len(src))
    assert dim == 0
    if offset_src:
        dst[:rows] = src[first : first + rows]
    else:
        dst[first : first + rows] = src[:rows]


def unpinned(tensor, *args, pin_memory=False, **kwargs):
    return tensor(*args, **kwargs)
