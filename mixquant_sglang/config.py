"""SGLang's face of a recipe: the quantization config that ``--quantization mixquant`` selects.

SGLang builds it without arguments in each scheduler process, asks it for the method of every layer, and calls
``finish_load`` (a hook) once the model is loaded, before the KV pool is sized.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

from mixquant_sglang import __version__, compat, fusion, recipe, refusals, runtime
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.fingerprint import fingerprint
from mixquant_sglang.hooks import table
from mixquant_sglang.kernels import fp4_tactics, gemm, select
from mixquant_sglang.kernels.verify import verify
from mixquant_sglang.matching import RuleMatcher
from mixquant_sglang.method import MixQuantLinearMethod
from mixquant_sglang.phase import Phase
from mixquant_sglang.prefill_weights.weights import PrefillWeights
from mixquant_sglang.ranks import check_same
from mixquant_sglang.refusals import refusing
from mixquant_sglang.runtime import Runtime
from mixquant_sglang.warm_up import warm_up

logger = logging.getLogger(__name__)

# What SGLang fuses in its dense models; a model's own packed_modules_mapping is added to it.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

# Layers that stay BF16 whatever the recipe says: routers, MLA's kv_b_proj (its weight is also read outside of apply),
# and towers for other modalities, whose rows are not the rows of the pass.
ALWAYS_BF16_LEAVES = frozenset({"gate", "router", "shared_expert_gate", "kv_b_proj"})
ALWAYS_BF16_TOWERS = frozenset(
    {"visual", "vision_tower", "vision_model", "vision_encoder", "audio_tower", "multi_modal_projector", "mm_projector"}
)


def always_bf16(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in ALWAYS_BF16_LEAVES or not ALWAYS_BF16_TOWERS.isdisjoint(parts)


class MixQuantConfig(QuantizationConfig):  # type: ignore[misc]
    """Raises ``SystemExit`` with one line for what the user can mend, so that nothing half-configured serves."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[str, None] = {}
        self._matcher: RuleMatcher | None = None
        self._ready: PrefillWeights | None = None
        self._not_ready: set[str] = set()
        self._pruned: torch.nn.Module | None = None
        with refusing():
            table.check_hooks_took_effect()
            self._recipe = recipe.load(recipe.requested())
            selection = select(self._recipe, compat.device())
            refusals.check_recipe(self._recipe, selection)
            if selection.kernels.get("nvfp4") == "native":
                compat.provide_fp4_linear_method(own_quantizer=self._recipe.fuse)
            if self._recipe.prefill_weights:
                self._ready = PrefillWeights.open(self._recipe.prefill_weights, self._recipe.prefill_weights_at)
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
            runtime.start(Runtime(self._recipe, selection, bf16_below=compat.bf16_below()))
        current = runtime.current()
        assert current is not None
        self._runtime = current
        current.finish_load = self.finish_load

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
        return cls()

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None  # embeddings, lm_head, attention and MoE experts take SGLang's unquantised default
        if self._matcher is None:
            self._matcher = RuleMatcher(self._recipe.layers, {**FUSED, **self.packed_modules_mapping})
        self._names[prefix] = None
        selection = self._runtime.selection
        with refusing():
            prefill, decode = self._matcher.precisions(prefix, selection.prefill, selection.decode)
            if always_bf16(prefix):
                prefill = decode = "bf16"
            ready = None
            if self._ready is not None and "nvfp4" in (prefill, decode):
                ready = self._ready.linear(prefix, self._matcher.shards(prefix))
                if ready is None:
                    self._not_ready.add(prefix)
                    prefill, decode = ("bf16" if p == "nvfp4" else p for p in (prefill, decode))
            elif self._ready is not None:
                reason = "never quantised" if always_bf16(prefix) else "by rule of the recipe"
                self._ready.keep(prefix, self._matcher.shards(prefix), reason)
        if (prefill, decode) == ("bf16", "bf16"):
            return UnquantizedLinearMethod()
        return MixQuantLinearMethod(self._runtime, prefix, prefill, decode, ready)

    def finish_load(self, model_runner: Any) -> None:
        """Checks the recipe against the layers that the model turned out to have, and reports what was packed."""
        model: torch.nn.Module = model_runner.model
        device = torch.device(model_runner.device)
        run = self._runtime
        with refusing():
            words = f"mixquant {__version__}, recipe {self._recipe.name} -> {run.selection.describe()}"
            check_same(fingerprint(self._recipe, run.selection), words, compat.rank_group())
            if self._matcher is not None:
                self._matcher.check_all_matched(self._names)
                for rule in self._matcher.unmatched():
                    logger.info("mixquant: %s: optional rule %s matches no layer", rule.where, recipe.show(rule.match))
            if self._ready is not None:
                self._ready.check_all_taken()
                self._ready.check_norms(model.named_parameters())
            methods = [m for m in run.layers if isinstance(m, MixQuantLinearMethod)]
            packed = [m for m in methods if {*m.precision.values()} != {"bf16"}]
            if run.selection.kernels and not packed:
                raise MixQuantError(
                    f"recipe {self._recipe.name} wants {' and '.join(run.selection.kernels)}, but no layer of this "
                    "model can take it; "
                    + ("; ".join(f"{m.name}: {m.refusal}" for m in methods[:3]) or "see the rules")
                )
        run.split = any(m.split for m in packed)
        total = 0
        stays: dict[str, list[str]] = {}
        run.precisions.clear()
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, MixQuantLinearMethod):
                run.precisions[method.precision[Phase.PREFILL]] += 1
                total += module.weight.nbytes
                if method.refusal:
                    stays.setdefault(method.refusal, []).append(name)
            elif isinstance(module, (LinearBase, ParallelLMHead, torch.nn.Linear)):
                run.precisions["bf16"] += 1
                total += module.weight.nbytes if isinstance(module, LinearBase) else 0
                reason = "by rule of the recipe" if isinstance(module, LinearBase) else "never quantised"
                if isinstance(module, LinearBase) and always_bf16(name):
                    reason = "never quantised"
                if name in self._not_ready:
                    reason = "not in the ready-made weights"
                stays.setdefault(reason, []).append(name)
            elif type(module).__name__ == "FusedMoE":
                stays.setdefault("MoE experts, never quantised by this version", []).append(name)
        run.finish_load = None
        if run.selection.kernels:
            extra = run.extra_weight_bytes
            logger.info(
                "mixquant: linears by prefill precision: %s; "
                "packed weights add %.1f MiB (%.0f%% of the linears' %.1f MiB)",
                ", ".join(f"{n} {precision}" for precision, n in sorted(run.precisions.items())),
                extra / 2**20,
                100 * extra / max(total, 1),
                total / 2**20,
            )
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
                logger.info("mixquant: memory peaked %.1f MiB above the loaded size while loading", peak / 2**20)
            for reason, names in stays.items():
                logger.info("mixquant: stays BF16 (%s): %s", reason, _some(names))
        if self._ready is not None:
            logger.info("mixquant: NVFP4 weights come from %s (%s)", self._ready.folder, self._ready.layout.name)
            for reason in sorted({*self._ready.unused.values()}):
                names = sorted(name for name, why in self._ready.unused.items() if why == reason)
                logger.info("mixquant: not taken from there (%s): %s", reason, _some(names))
        self._tune_fp4(model_runner, [m for m in packed if m.runs("nvfp4", "native")])
        if self._recipe.verify and run.selection.kernels.get("nvfp4") == "native":
            first: dict[tuple[int, int], MixQuantLinearMethod] = {}
            for m in packed:
                if m.runs("nvfp4", "native"):
                    first.setdefault(m.shape, m)
            with refusing():
                count, worst = verify((m.verification() for m in first.values()), device)
            logger.info(
                "mixquant: native nvfp4 agrees with the emulated kernel for %d shapes (worst relative error %.2g)",
                count,
                worst,
            )
        watching = refusals.watching(model_runner.server_args)
        if self._recipe.fuse and watching:
            logger.info("mixquant: nothing fused and no row left out, so that %s sees all", " and ".join(watching))
        elif self._recipe.fuse:
            self._fuse(model_runner)
        fp8 = {shape for m in packed if m.runs("fp8", "native") for shape in m.gemm_shapes}
        if fp8:
            most = gemm.bucket(compat.most_prefill_rows(model_runner))
            with refusing():
                rows = [2**e for e in range(8, max(most.bit_length(), 9))]
                gemm.use(gemm.load_or_tune(sorted(fp8), rows, device, compat.kernel_versions()))
        if packed and device.type == "cuda":
            logger.info("mixquant: %s", warm_up(model, packed, device))

    def _tune_fp4(self, model_runner: Any, methods: list[MixQuantLinearMethod]) -> None:
        measuring = compat.fp4_gemm_measuring(model_runner) if methods else None
        if measuring is not None:
            most = compat.most_prefill_rows(model_runner)
            tuned = fp4_tactics.tune([m.copy_in("nvfp4") for m in methods], most, measuring)
            logger.info("mixquant: %s", tuned)

    def _fuse(self, model_runner: Any) -> None:
        done = fusion.fuse(model_runner.model)
        if self._runtime.split and model_runner.is_generation:
            self._runtime.prunes = fusion.prune_last_layer(model_runner.model)
        if self._runtime.prunes:
            self._pruned = model_runner.model
            self._runtime.finish_attention = self.finish_attention
        if done or self._runtime.prunes:
            what = [f"{n} {kind}" for kind, n in done.items()]
            what += ["the last layer's unread rows left out"] if self._runtime.prunes else []
            logger.info("mixquant: fused in prefill: %s", ", ".join(what))

    def finish_attention(self, model_runner: Any) -> None:
        """Completes what ``_fuse`` began, each time that the model's attention back end was built."""
        if model_runner.model is not self._pruned:
            return
        reason = fusion.prune_last_attention(model_runner.model, model_runner.attn_backend)
        self._runtime.prunes_attention = not reason
        if reason:
            logger.info("mixquant: the last layer's attention computes all rows: %s", reason)
        else:
            logger.info("mixquant: the last layer's attention leaves out unread rows in long prefill passes")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def register() -> None:
    """Lets SGLang's model config and loader find ``MixQuantConfig`` under the name."""
    from sglang.srt.layers import quantization

    compat.hush_unknown_method_warning()
    quantization.QUANTIZATION_METHODS[compat.NAME] = MixQuantConfig
    cpu_methods = getattr(quantization, "CPU_QUANTIZATION_METHODS", None)
    if cpu_methods is not None:
        cpu_methods[compat.NAME] = MixQuantConfig
