"""Stand-ins for the two FlashInfer calls at the end of SGLang's FP4 linear method: they take exactly the bytes, layouts
and scales of the real ones, and assert it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from mixquant_sglang.formats import nvfp4, scale_layout

CALLS: list[str] = []
SUM = torch.float32  # what the stand-in for the GEMM multiplies and adds in


def fp4_quantize(x: torch.Tensor, global_scale: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's ``fp4_quantize``: codes [M, K/2], and block scales swizzled 128x4; ``global_scale`` encodes."""
    assert x.dtype == torch.bfloat16 and x.is_contiguous() and global_scale.shape == ()
    packed = nvfp4.quantize(x, scales="absmax", tensor_scale=float(1 / global_scale))
    CALLS.append("fp4_quantize")
    return packed.packed, packed.swizzled_scales().view(torch.uint8)


def gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scales: torch.Tensor,
    weight_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
    n: int,
) -> torch.Tensor:
    """FlashInfer's ``mm_fp4`` as SGLang calls it: transposed weight and scales, alpha on the FP32 sum."""
    k = 2 * x.shape[1]
    assert weight.shape == (x.shape[1], n) and k % 32 == n % 32 == 0 and dtype == torch.bfloat16
    assert x.dtype == weight.dtype == x_scales.dtype == torch.uint8 and weight_scales.dtype == torch.float8_e4m3fn
    assert x_scales.shape == (-(-x.shape[0] // 128) * 128, -(-k // 64) * 4)
    assert x.is_contiguous() and x_scales.is_contiguous() and weight.T.is_contiguous() and alpha.shape == ()
    CALLS.append("fp4_gemm")

    def read(codes: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
        linear = scale_layout.unswizzle_scales(scales.contiguous().view(torch.float8_e4m3fn), rows, k)
        one = torch.ones((), dtype=torch.float32)
        return nvfp4.NVFP4Tensor(codes.contiguous(), linear, one).unscaled(torch.float32).to(SUM)

    total = read(x, x_scales, x.shape[0]) @ read(weight.T, weight_scales.T, n).T
    return (total * alpha).to(dtype)


def install(set_attribute: Callable[[object, str, object], None]) -> None:
    """Has SGLang's FP4 linear method believe that it runs on a Blackwell GPU; ``set_attribute`` as ``setattr``."""
    from sglang.srt.layers.quantization import fp4_utils, modelopt_quant

    backend = SimpleNamespace(
        is_marlin=lambda: False, is_flashinfer_trtllm=lambda: False, is_flashinfer_cutedsl=lambda: False
    )
    set_attribute(modelopt_quant, "get_fp4_gemm_runner_backend", lambda: backend)
    if hasattr(modelopt_quant, "is_blackwell_supported"):
        set_attribute(modelopt_quant, "is_blackwell_supported", lambda: True)
    if hasattr(modelopt_quant, "get_platform"):
        set_attribute(modelopt_quant, "get_platform", lambda: SimpleNamespace(is_blackwell=True))
    set_attribute(modelopt_quant, "enable_flashinfer_fp4_gemm", True)
    set_attribute(modelopt_quant, "fp4_quantize", fp4_quantize)
    set_attribute(modelopt_quant, "fp4_gemm", gemm)
    set_attribute(torch.Tensor, "cuda", lambda self: self)
    set_attribute(fp4_utils, "get_fp4_gemm_runner_backend", lambda: backend)
