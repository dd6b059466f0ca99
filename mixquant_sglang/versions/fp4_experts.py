"""SGLang's NVFP4 experts for SM100 and SM103, of ``--moe-runner-backend flashinfer_trtllm``: layout and call.

What ``--quantization nvfp4_online`` does with BF16 checkpoints (``quantization/nvfp4_online.py`` and
``ModelOptNvFp4FusedMoEMethod.process_weights_after_loading``), with weights that were quantised here: activation scales
are of each token, found at run time, and the static ones are 1.
"""

from __future__ import annotations

import torch

from mixquant_sglang.kernels.environment import LinearExperts


class TrtllmFP4Experts:
    """``kernels.environment.FP4Experts``."""

    def arrange(self, weights: LinearExperts) -> tuple[torch.Tensor, ...]:
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import align_fp4_moe_weights_for_flashinfer_trtllm

        one = torch.ones((), dtype=torch.float32, device=weights.w13.device)
        layer = torch.nn.Module()
        layer.moe_runner_config = MoeRunnerConfig()  # gated: all that is read of it
        for name, value in (
            ("w13_weight", weights.w13),
            ("w13_weight_scale", weights.scales13),
            ("w2_weight", weights.w2),
            ("w2_weight_scale", weights.scales2),
            ("g1_alphas", weights.gate),
            ("g1_alphas_up", weights.up),
            ("w2_input_scale_quant", one),
        ):
            setattr(layer, name, value)
        align_fp4_moe_weights_for_flashinfer_trtllm(layer)
        made = (layer.w13_weight, layer.w13_weight_scale, layer.w2_weight, layer.w2_weight_scale, layer.g1_scale_c)
        return (*(tensor.detach() for tensor in made), weights.gate, weights.down, one)  # type: ignore[operator]

    def run(
        self,
        arranged: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig, moe_output_buffer_ctx
        from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import (
            FlashInferTrtllmFp4MoeQuantInfo,
            flashinfer_trtllm_deferred_finalize_context,
            fused_experts_none_to_flashinfer_trtllm_fp4,
        )
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput
        from sglang.srt.layers.moe.utils import RoutingMethodType

        w13, scales13, w2, scales2, up_to_w2, gate, down, one = arranged
        experts = len(w13)
        # Ids are of this rank already, and -1 is no expert: the routing kernels leave out what is not in [offset,
        # offset + local).  FlashInfer wants no fewer experts than a token has, of which some may be other ranks'.
        info = FlashInferTrtllmFp4MoeQuantInfo(
            w13_weight=w13,
            w2_weight=w2,
            w13_weight_scale=scales13,
            w2_weight_scale=scales2,
            g1_scale_c=up_to_w2,
            g1_alphas=gate,
            g2_alphas=down,
            w13_input_scale_quant=one,
            global_num_experts=max(experts, ids.shape[1]),
            local_expert_offset=0,
            local_num_experts=experts,
            intermediate_size_per_partition=2 * w2.shape[2],
            routing_method_type=RoutingMethodType.Renormalize,  # not read: the routing is given
            use_per_token_activation=True,
        )
        dispatched = StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, weights[:0]))
        # A model may name a buffer for the result, its input even, which protected rows are still to be read from; and
        # may ask for a result whose sum it does itself.
        with moe_output_buffer_ctx(torch.empty_like(x)), flashinfer_trtllm_deferred_finalize_context(False):
            out: torch.Tensor = fused_experts_none_to_flashinfer_trtllm_fp4(
                dispatched, info, MoeRunnerConfig(activation=activation), use_routed_topk=True
            ).hidden_states
        return out
