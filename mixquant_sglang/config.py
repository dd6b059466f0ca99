"""SGLang's face of a recipe: the quantization config that ``--quantization mixquant`` selects.

SGLang builds it without arguments in each scheduler process, asks it for the method of every layer, and calls
``finish_load`` (a hook) once the model is loaded, before the KV pool is sized.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from mixquant_sglang import __version__, bypasses, compat, fusion, probe, recipe, refusals, report, runtime
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.hooks import table
from mixquant_sglang.kernels import fp4_tactics, gemm, select
from mixquant_sglang.kernels.verify import verify
from mixquant_sglang.matching import RuleMatcher
from mixquant_sglang.method import MixQuantLinearMethod
from mixquant_sglang.modules import FUSED, NEVER, why_bf16
from mixquant_sglang.prefill_weights.weights import PrefillWeights
from mixquant_sglang.ranks import check_same
from mixquant_sglang.recipe import LayerRule
from mixquant_sglang.refusals import refusing
from mixquant_sglang.runtime import Runtime, some
from mixquant_sglang.warm_up import warm_up

logger = logging.getLogger(__name__)


class MixQuantConfig(QuantizationConfig):  # type: ignore[misc]
    """Raises ``SystemExit`` with one line for what the user can mend, so that nothing half-configured serves."""

    weight_block_size = None  # some models read it off any config that they get

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[str, None] = {}
        self._matcher: RuleMatcher | None = None
        self._ready: PrefillWeights | None = None
        self._left: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()  # to SGLang, and why
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
            identity = self._ready.identity() if self._ready is not None else ""
            runtime.start(Runtime(self._recipe, selection, ready_made=identity))
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
            never = why_bf16(prefix)
            why = "by rule of the recipe" if selection.kernels else "by the recipe"
            if never:
                prefill = decode = "bf16"
                why = never
            ready = None
            if self._ready is not None and "nvfp4" in (prefill, decode):
                ready = self._ready.linear(prefix, self._matcher.shards(prefix))
                if ready is None:
                    why = "not in the ready-made weights"
                    prefill, decode = ("bf16" if p == "nvfp4" else p for p in (prefill, decode))
            elif self._ready is not None:
                self._ready.keep(prefix, self._matcher.shards(prefix), NEVER if never else why)
        if (prefill, decode) == ("bf16", "bf16"):
            self._left[layer] = why
            return UnquantizedLinearMethod()
        return MixQuantLinearMethod(self._runtime, prefix, prefill, decode, ready)

    def finish_load(self, model_runner: Any) -> None:
        """Checks the recipe against the layers that the model turned out to have, and reports what was packed."""
        model: torch.nn.Module = model_runner.model
        device = torch.device(model_runner.device)
        run = self._runtime
        with refusing():
            words = f"mixquant {__version__}, recipe {self._recipe.name} -> {run.selection.describe()}"
            check_same(run.fingerprint, words, compat.rank_group())
            run.weights.agree = compat.agree
            run.known.add_parameters(model, ranks=compat.tensor_parallel_ranks())
            run.weights.keep(module.quant_method for module in model.modules() if hasattr(module, "quant_method"))
            run.weights.finish_load()
            if self._matcher is not None:
                self._matcher.check_all_matched(self._names)
                for rule in self._matcher.unmatched():
                    logger.info("mixquant: %s: optional rule %s matches no layer", rule.where, recipe.show(rule.match))
            if self._ready is not None:
                self._ready.check_all_taken()
                self._ready.check_norms(model.named_parameters())
            report.keep_outside_bf16(model)
            self._check_ready_names(model)
            methods = [m for m in run.layers if isinstance(m, MixQuantLinearMethod)]
            packed = [m for m in methods if {*m.precision.values()} != {"bf16"}]
            if run.selection.kernels and not packed:
                raise MixQuantError(
                    f"recipe {self._recipe.name} wants {' and '.join(run.selection.kernels)}, but no layer of this "
                    "model can take it; "
                    + ("; ".join(f"{m.name}: {m.refusal}" for m in methods[:3]) or "see the rules")
                )
        run.split = any(m.split for m in packed)
        total = report.describe(model, run, self._left)
        run.finish_load = None
        if run.selection.kernels:
            report.log_precisions(run, total)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
                logger.info("mixquant: memory peaked %.1f MiB above the loaded size while loading", peak / 2**20)
            report.log_reasons(run, run.stays_bf16)
        if packed:
            run.prove = self.prove
        if self._ready is not None:
            logger.info("mixquant: NVFP4 weights come from %s (%s)", self._ready.folder, self._ready.layout.name)
            for reason in sorted({*self._ready.unused.values()}):
                names = sorted(name for name, why in self._ready.unused.items() if why == reason)
                logger.info("mixquant: not taken from there (%s): %s", reason, some(names))
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
        guarded = bypasses.guard(model)
        if guarded:
            logger.info("mixquant: SGLang's fused input projections of %d layers run in BF16 passes alone", guarded)
        if self._recipe.fuse:
            self._fuse(model_runner)
        fp8 = {shape for m in packed if m.runs("fp8", "native") for shape in m.gemm_shapes}
        if fp8:
            most = gemm.bucket(compat.most_prefill_rows(model_runner))
            with refusing():
                rows = [2**e for e in range(8, max(most.bit_length(), 9))]
                gemm.use(gemm.load_or_tune(sorted(fp8), rows, device, compat.kernel_versions()))
        if packed and device.type == "cuda":
            logger.info("mixquant: %s", warm_up(model, packed, device))

    def _check_ready_names(self, model: torch.nn.Module) -> None:
        """Refuses modules that SGLang built under one prefix: ready-made weights are looked up by it."""
        if self._ready is None:
            return
        known: dict[str, str] = {}
        for name, method in report.linears(model):
            if {*method.precision.values()} != {"bf16"} and known.setdefault(method.name, name) != name:
                raise MixQuantError(
                    f"{self._recipe.prefill_weights_at}: {known[method.name]} and {name} are both {method.name} to "
                    "SGLang, so ready-made weights cannot be told apart; leave 'weights' out"
                )

    def prove(self, model_runner: Any, eager_runner: Any) -> None:
        """Runs the model once, and makes the report what ran; see ``probe.py``."""
        run = self._runtime
        run.prove = None
        with refusing():
            probe.prove(model_runner, eager_runner, run, self._left, self._asking)

    def _asking(self, method: MixQuantLinearMethod) -> tuple[LayerRule, ...]:
        assert self._matcher is not None
        return self._matcher.asking(method.name)

    def _tune_fp4(self, model_runner: Any, methods: list[MixQuantLinearMethod]) -> None:
        measuring = compat.fp4_gemm_measuring(model_runner) if methods else None
        if measuring is not None:
            most = compat.most_prefill_rows(model_runner)
            tuned = fp4_tactics.tune([m.copy_in("nvfp4") for m in methods], most, measuring)
            logger.info("mixquant: %s", tuned)

    def _fuse(self, model_runner: Any) -> None:
        if watching := refusals.watching(model_runner.server_args):
            logger.info("mixquant: nothing fused and no row left out, so that %s sees all", " and ".join(watching))
            return
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


def register() -> None:
    """Lets SGLang's model config and loader find ``MixQuantConfig`` under the name."""
    from sglang.srt.layers import quantization

    compat.hush_unknown_method_warning()
    quantization.QUANTIZATION_METHODS[compat.NAME] = MixQuantConfig
    cpu_methods = getattr(quantization, "CPU_QUANTIZATION_METHODS", None)
    if cpu_methods is not None:
        cpu_methods[compat.NAME] = MixQuantConfig
