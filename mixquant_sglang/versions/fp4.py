"""SGLang's FP4 linear method and experts, and the measuring of its GEMMs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.versions.dialect import dialect
from mixquant_sglang.versions.fp4_experts import TrtllmFP4Experts


def environment(*, own_quantizer: bool = True) -> Environment:
    """SGLang's ModelOpt FP4 linear method and its FP4 experts; refuses back ends that cannot serve native NVFP4.

    ``own_quantizer``: activations are quantised by our kernels, fused where that is possible, or by FlashInfer's."""
    from sglang.srt.layers.quantization.fp4_utils import get_fp4_gemm_runner_backend
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config, ModelOptFp4LinearMethod

    backend = get_fp4_gemm_runner_backend()
    if backend.is_marlin():
        raise MixQuantError(
            "--fp4-gemm-backend marlin leaves activations in BF16; "
            "native nvfp4 needs one of SGLang's flashinfer back ends"
        )
    # FlashInfer's fast mode moves up to 0.6% of the codes; the emulated kernel follows the exact one.
    os.environ.setdefault("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "1")
    config = ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16, exclude_modules=[])
    if getattr(ModelOptFp4LinearMethod(config), "quant_mode", "w4a4") != "w4a4":
        raise MixQuantError(
            "SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16 leaves activations in BF16; unset it for native nvfp4"
        )
    return Environment(lambda: ModelOptFp4LinearMethod(config), own_quantizer, TrtllmFP4Experts())


def fp4_gemm_measuring(model_runner: Any) -> AbstractContextManager[None] | None:
    """SGLang's context in which FlashInfer measures the GEMMs that it is asked for, and keeps the results in SGLang's
    file of the model and rank; with several ranks they agree on them (0.5.23).  None where SGLang is not to measure:
    ``--disable-flashinfer-autotune``, and ``--enable-deterministic-inference``, since the GEMM measured best depends on
    the number of rows, and with it the order of summation."""
    args = model_runner.server_args
    if args.disable_flashinfer_autotune or args.enable_deterministic_inference:
        return None
    from sglang.srt.model_executor.runner.flashinfer_autotune import flashinfer_autotune_context

    # as for a run of the model that computes logits: no model is run here
    context: AbstractContextManager[None] = flashinfer_autotune_context(model_runner, **dialect().autotune_logits())
    return context
