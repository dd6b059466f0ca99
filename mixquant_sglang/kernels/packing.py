"""Weights to NVFP4 with the search for block scales on the GPU, where there is one that can run it."""

from __future__ import annotations

import torch

from mixquant_sglang.formats import nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor


def quantize_nvfp4(
    x: torch.Tensor,
    *,
    scales: str = "absmax",
    tensor_scale: float | torch.Tensor | None = None,
    column_weights: torch.Tensor | None = None,
) -> NVFP4Tensor:
    """``formats.nvfp4.quantize``; on a GPU of SM80 or newer its search is ``triton/scale_search.py``.

    The same bits either way."""
    kernel: nvfp4.Search | None = None
    if has_search(x.device):
        from mixquant_sglang.kernels.triton import scale_search

        kernel = scale_search.quantize_
    return nvfp4.quantize(x, scales=scales, tensor_scale=tensor_scale, column_weights=column_weights, kernel=kernel)


def has_search(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
