"""Stand-ins for the FlashInfer calls at the end of SGLang's FP4 linear method and FP4 experts: they take exactly the
bytes, layouts and scales of the real ones, and assert it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

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


# -- experts -----------------------------------------------------------------------------------------------------------


def interleave(scales: torch.Tensor) -> torch.Tensor:
    """FlashInfer's ``nvfp4_block_scale_interleave``: 128x4, flat."""
    assert scales.dtype == torch.uint8 and scales.dim() == 2
    return scale_layout.swizzle_scales(scales.view(torch.float8_e4m3fn)).view(torch.uint8).flatten()


def by_token(x: torch.Tensor, inverse: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, block scales, and a scale for each row: its maximum times ``inverse``, and 0 for a row of zeros."""
    scales = x.float().abs().amax(dim=-1) * inverse
    rows = x.float() / scales.masked_fill(scales == 0, 1.0)[:, None]
    return (*nvfp4._quantize_blocks(rows, 1.0, search=False), scales)


def nvfp4_quantize(
    x: torch.Tensor, inverse: torch.Tensor, *, sfLayout: object, per_token_activation: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flashinfer import SfLayout

    assert sfLayout is SfLayout.layout_linear and per_token_activation and backend == "cute-dsl"
    assert x.dtype == torch.bfloat16 and x.is_contiguous() and inverse.shape == (1,)
    CALLS.append("nvfp4_quantize")
    packed, scales, rows = by_token(x, float(inverse))
    return packed, scales.view(torch.uint8), rows


def plain_rows(weight: torch.Tensor, scales: torch.Tensor, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K/2] and [N, K/16] as the kernels read them -> rows in order: up before gate where ``gated``.

    The GEMM gives row ``order[i]`` of a weight where row i lies; neighbours are then what the activation multiplies."""
    from flashinfer.fused_moe import core
    from flashinfer.utils import get_shuffle_matrix_a_row_indices

    n, k = weight.shape[0], 2 * weight.shape[1]
    order = get_shuffle_matrix_a_row_indices(weight, 128)
    if gated:
        order = core.get_reorder_rows_for_gated_act_gemm_row_indices(weight)[order]
    assert sorted(order.tolist()) == list(range(n))
    linear = scale_layout.unswizzle_scales(scales, n, k)
    rows, block_scales = torch.empty_like(weight), torch.empty_like(linear)
    rows[order], block_scales.view(torch.uint8)[order] = weight, linear.view(torch.uint8)
    return rows, block_scales


def unpack_routes(routing: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 ids and weights, from (ids, float32 weights) or from ids above 16 bits of BF16."""
    if isinstance(routing, tuple):
        ids, weights = routing
        assert weights.dtype == torch.float32
    else:
        ids, weights = routing >> 16, (routing << 16).view(torch.float32)
    assert ids.dtype == torch.int32 and ids.is_contiguous()
    return ids, weights


def routed_moe(
    *,
    topk_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    per_token_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    output1_scale_scalar: torch.Tensor,
    output1_scale_gate_scalar: torch.Tensor,
    output2_scale_scalar: torch.Tensor,
    num_experts: int,
    top_k: int,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    activation_type: int,
    output: torch.Tensor,
    do_finalize: bool,
    **rest: object,
) -> list[torch.Tensor]:
    """FlashInfer's ``trtllm_fp4_block_scale_routed_moe``, checking what its C++ launcher checks."""
    from flashinfer.fused_moe.core import ActivationType

    none = ("routing_bias", "gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    assert all(rest[name] is None for name in (*none, "routed_scaling_factor")) and do_finalize
    experts, h, i = len(gemm1_weights), 2 * hidden_states.shape[1], intermediate_size
    assert gemm1_weights.shape == (experts, 2 * i, h // 2) and gemm2_weights.shape == (experts, h, i // 2)
    assert gemm1_weights_scale.shape == (experts, 2 * i, h // 16) and gemm2_weights_scale.shape == (experts, h, i // 16)
    assert i % 128 == h % 128 == 0 and hidden_states_scale.shape == (len(hidden_states), h // 16)
    fp8 = (hidden_states_scale, gemm1_weights_scale, gemm2_weights_scale)
    assert all(t.dtype == torch.float8_e4m3fn and t.is_contiguous() for t in fp8)
    assert all(t.dtype == torch.uint8 and t.is_contiguous() for t in (hidden_states, gemm1_weights, gemm2_weights))
    for scalar in (output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar):
        assert scalar.shape == (experts,) and scalar.dtype == torch.float32 and scalar.is_contiguous()
    assert per_token_scale.shape == (len(hidden_states),) and per_token_scale.dtype == torch.float32
    ids, weights = unpack_routes(topk_ids)
    assert local_num_experts == experts and 0 <= local_expert_offset <= num_experts - experts
    assert 0 < top_k <= num_experts and ids.shape == weights.shape == (len(hidden_states), top_k)
    assert output.shape == (len(hidden_states), h) and output.dtype == torch.bfloat16
    act = {ActivationType.Swiglu.value: F.silu, ActivationType.Geglu.value: F.gelu}[activation_type]
    CALLS.append("routed_moe")

    def read(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return nvfp4.NVFP4Tensor(codes, scales, torch.ones(())).unscaled(torch.float32).double()

    x = read(hidden_states, hidden_states_scale) * per_token_scale.double()[:, None]
    total = torch.zeros(output.shape, dtype=torch.float64)
    for e in range(experts):
        token, place = (ids - local_expert_offset == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        w13 = read(*plain_rows(gemm1_weights[e], gemm1_weights_scale[e], gated=True))
        up, gate = (x[token] @ w13.t()).chunk(2, dim=-1)
        up, gate = up * float(output1_scale_scalar[e]), gate * float(output1_scale_gate_scalar[e])
        codes, scales, rows = by_token((act(gate) * up).to(torch.bfloat16), 1 / (448 * 6))
        w2 = read(*plain_rows(gemm2_weights[e], gemm2_weights_scale[e], gated=False))
        out = read(codes, scales) @ w2.t() * rows.double()[:, None] * float(output2_scale_scalar[e])
        total.index_add_(0, token, out.to(torch.bfloat16).double() * weights[token, place, None].double())
    output.copy_(total)
    return [output]


def install_experts(set_attribute: Callable[[object, str, object], None]) -> None:
    """Has SGLang's FP4 experts believe that FlashInfer's kernels are there."""
    import flashinfer
    import flashinfer.fused_moe
    from sglang.srt.layers.moe.moe_runner import flashinfer_trtllm

    set_attribute(flashinfer, "nvfp4_block_scale_interleave", interleave)
    set_attribute(flashinfer, "nvfp4_quantize", nvfp4_quantize)
    set_attribute(flashinfer.fused_moe, "trtllm_fp4_block_scale_routed_moe", routed_moe)
    pack = getattr(flashinfer_trtllm, "PackTopkIds", None)
    if pack is not None:  # 0.5.17; elsewhere than on a GPU by SGLang's own other way
        set_attribute(pack, "execute", pack.vanilla)
