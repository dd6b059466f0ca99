"""Which part of a linear a rank has, told from SGLang's layer."""

from __future__ import annotations

import torch

from mixquant_sglang.versions.dialect import dialect
from mixquant_sglang.weights.ready_made_linear import Share


def share_of(layer: torch.nn.Module, sizes: list[int], k: int, full_k: int) -> Share:
    """``sizes``: rows of the rank's parts of a fused linear; ``k``: its columns, of ``full_k`` in the checkpoint."""
    replicas = getattr(layer, "num_kv_head_replicas", 1)
    return Share(tuple(sizes), k, full_k, *dialect().tensor_parallel(layer), replicas)
