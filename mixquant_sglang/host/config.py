"""SGLang's face of a recipe: the quantization config that ``--quantization mixquant`` selects.

SGLang builds it without arguments in each scheduler process and asks it for the method of every layer.  What is done
once the model is loaded: ``lifecycle.py``.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from mixquant_sglang import __version__
from mixquant_sglang.errors import refusing
from mixquant_sglang.host import refusals, runtime, sent
from mixquant_sglang.host.assignment import Assignment
from mixquant_sglang.host.hooks import registry
from mixquant_sglang.host.lifecycle import LoadSteps
from mixquant_sglang.host.runtime import Pair, Runtime
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.layers.quantised import QuantisedLinearMethod
from mixquant_sglang.recipe import pairs
from mixquant_sglang.versions import fp4, fp8_blocks, machine
from mixquant_sglang.versions.loading import cache_dtype, loads_dummy
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.quantised_config import check_recipe
from mixquant_sglang.weights.ready_made import ReadyMadeWeights

logger = logging.getLogger(__name__)


class MixQuantConfig(QuantizationConfig):  # type: ignore[misc]
    """Raises ``SystemExit`` with one line for what the user can mend, so that nothing half-configured serves."""

    weight_block_size = None  # some models read it off any config that they get

    def __init__(self, checkpoint: str | None = None) -> None:
        """``checkpoint``: the folder of a quantised one, whose weights are the only ones."""
        super().__init__()
        ready: ReadyMadeWeights | None = None
        master: QuantisedCheckpoint | None = None
        with refusing():
            registry.check_hooks_took_effect()
            asked, device, mode = sent.served(), machine.device(), machine.disaggregation()
            refusals.check_asked(asked, os.environ.get(machine.ASKED_ENV))
            self._recipe, selection = pairs.select_for(asked, device, mode)
            refusals.check_recipe(self._recipe, selection)
            environment = Environment(invariant=machine.deterministic())
            if selection.kernels.get("nvfp4") == "native":
                own = fp4.environment(own_quantizer=self._recipe.fuse)
                environment = replace(own, invariant=environment.invariant)
            if self._recipe.prefill_weights:
                ready = ReadyMadeWeights.open(
                    self._recipe.prefill_weights, self._recipe.prefill_weights_at, self._recipe.prefill_rounding
                )
            if checkpoint is not None:
                master = QuantisedCheckpoint.open(Path(checkpoint))
                check_recipe(self._recipe, master.family, checkpoint)
                master.check_start(dummy=loads_dummy(), cache_dtype=cache_dtype())
                if master.family.blocks and selection.kernels.get("fp8") == "native":
                    environment = replace(environment, fp8_block_linear=fp8_blocks.block_linear(device))
        known = runtime.current()
        if known is None or known.recipe != self._recipe:
            # SGLang builds the config more than once per load; only the first time is news.
            logger.info(
                "mixquant %s: recipe %s -> %s; because %s",
                __version__,
                self._recipe.name,
                selection.describe(),
                selection.reason,
            )
            identity = ready.identity() if ready is not None else ""
            pair = Pair(mode, asked, pairs.kv_fingerprint(asked, device, ready_made=identity)) if mode else None
            runtime.start(Runtime(self._recipe, selection, ready_made=identity, environment=environment, pair=pair))
        current = runtime.current()
        assert current is not None
        self._runtime = current
        self._assignment = Assignment(self._recipe, selection, ready, master)
        if current.lifecycle is None or current.lifecycle.loading:
            current.lifecycle = LoadSteps(current, self._assignment)
            current.use_quantised(master)
        else:  # no path of SGLang that is not refused does this
            logger.warning("mixquant: SGLang built the quantization config again after the model was loaded: not used")

    @classmethod
    def get_name(cls) -> str:
        return "mixquant"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MixQuantConfig:
        return cls(config.get("checkpoint"))

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, (LinearBase, FusedMoE)):
            return None  # embeddings, lm_head and attention take SGLang's unquantised default
        with refusing():
            assigned = self._assignment.of(prefix, self.packed_modules_mapping)
        if assigned.bf16:
            self._assignment.left[layer] = assigned.why
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, FusedMoE):
            flags = layer.use_triton_kernels, layer.use_flashinfer_trtllm_moe, layer.use_deep_gemm
            precisions = assigned.prefill, assigned.decode
            return MixQuantExpertsMethod(self._runtime, prefix, *precisions, assigned.ready_experts, flags=flags)
        if assigned.quantised is not None:
            precisions = assigned.prefill, assigned.decode
            return QuantisedLinearMethod(self._runtime, prefix, *precisions, assigned.quantised)
        return MixQuantLinearMethod(self._runtime, prefix, assigned.prefill, assigned.decode, assigned.ready)


def register() -> None:
    """Lets SGLang's model config and loader find ``MixQuantConfig`` under the name."""
    from sglang.srt.layers import quantization

    machine.hush_unknown_method_warning()
    quantization.QUANTIZATION_METHODS[machine.NAME] = MixQuantConfig
    cpu_methods = getattr(quantization, "CPU_QUANTIZATION_METHODS", None)
    if cpu_methods is not None:
        cpu_methods[machine.NAME] = MixQuantConfig
