"""SGLang's Marlin for FP8 and NVFP4 weights, as arms of ``bench_packed``.

Its weights lie in tiles of its own, so beside W8A8 or W4A4 they are a second copy.  FP8's channel scales and NVFP4's
tensor scale are rounded to BF16 there, and subnormal block scales are zeros: other numbers than ours.  SGLang has nvcc
compile it at first use, as its other JIT kernels: that may take minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mixquant_sglang.kernels.triton.packed_rows import Packed


def products(weights: list[Packed]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """For each weight a function from BF16 rows [M, K] to BF16 [M, N]; two weights must not share a layout's memory."""
    return [(_fp8 if weight.block_scales is None else _nvfp4)(weight) for weight in weights]


def check(product: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, what: str) -> None:
    """Ends the run where the product with the weight ``values`` is another one: what was timed would say nothing."""
    x = torch.randn(16, values.shape[1], dtype=torch.bfloat16, device="cuda")
    want = x.double() @ values.t()
    off = float((product(x).double() - want).norm() / want.norm())
    if not off < 0.01:  # BF16 scales and results: 2^-8 at most each
        raise SystemExit(f"Marlin, {what}: its results are off by {off:.3g} of their size")


def _layer(weight: Packed) -> Any:
    layer: Any = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = weight.shape
    layer.orig_dtype = layer.params_dtype = torch.bfloat16
    layer.weight = torch.nn.Parameter(weight.codes.clone(), requires_grad=False)
    return layer


def _fp8(weight: Packed) -> Callable[[torch.Tensor], torch.Tensor]:
    from sglang.srt.layers.quantization.marlin_utils_fp8 import apply_fp8_marlin_linear, prepare_fp8_layer_for_marlin

    (n, k), layer = weight.shape, _layer(weight)
    layer.weight_scale = torch.nn.Parameter(weight.scale.clone(), requires_grad=False)
    prepare_fp8_layer_for_marlin(layer, size_k_first=False)
    return partial(
        apply_fp8_marlin_linear,
        weight=layer.weight,
        weight_scale=layer.weight_scale,
        workspace=layer.workspace,
        size_n=n,
        size_k=k,
        bias=None,
    )


def _nvfp4(weight: Packed) -> Callable[[torch.Tensor], torch.Tensor]:
    from sglang.srt.layers.quantization.marlin_utils_fp4 import apply_fp4_marlin_linear, prepare_nvfp4_layer_for_marlin

    assert weight.block_scales is not None
    (n, k), layer = weight.shape, _layer(weight)
    layer.weight_scale = torch.nn.Parameter(weight.block_scales.clone(), requires_grad=False)
    layer.weight_global_scale = torch.nn.Parameter(weight.scale.clone(), requires_grad=False)
    prepare_nvfp4_layer_for_marlin(layer)
    return partial(
        apply_fp4_marlin_linear,
        weight=layer.weight,
        weight_scale=layer.weight_scale,
        weight_global_scale=layer.weight_global_scale,
        workspace=layer.workspace,
        size_n=n,
        size_k=k,
    )
