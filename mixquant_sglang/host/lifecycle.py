"""What is done with a model once SGLang loaded it, gave it an attention back end, and can run it: named steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from mixquant_sglang import __version__
from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.host import compact, deterministic, min_tokens, probe, quantised, refusals, report, tuning
from mixquant_sglang.host.around_attention import install_around_attention, prepare_around_attention
from mixquant_sglang.host.assignment import Assignment
from mixquant_sglang.host.ranks import check_same
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.host.shortage import explain
from mixquant_sglang.kernels.verify import verify
from mixquant_sglang.kernels.verify_experts import verify_experts
from mixquant_sglang.layers import attention, bypasses, fused, last_layer
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.layers.warm_up import warm_up
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.text import show, some
from mixquant_sglang.versions import lora, speculation
from mixquant_sglang.versions.groups import (
    agree,
    attention_ranks,
    gathers_rows,
    over_stages,
    rank_group,
    tensor_parallel_ranks,
)
from mixquant_sglang.weights.sample import sample

logger = logging.getLogger(__name__)

Packed: TypeAlias = "MixQuantLinearMethod | MixQuantExpertsMethod"


class LoadSteps:
    """Of one load.  Its methods end the process with one line for what the user can mend."""

    def __init__(self, run: Runtime, assignment: Assignment) -> None:
        self.loading = True
        self.unproved = False
        self._run = run
        self._assignment = assignment
        self._ready = assignment.ready
        self._pruned: torch.nn.Module | None = None
        self._adapted = False  # whether SGLang puts adapters (LoRA) on linears of the model

    def finish_load(self, model_runner: Any) -> None:
        """Checks the recipe against the layers that the model turned out to have, and reports what was packed."""
        model: torch.nn.Module = model_runner.model
        device = torch.device(model_runner.device)
        self._run.shortage = partial(explain, self._run, model_runner)
        with refusing():
            self._finish_weights(model)
            if self._run.pair is not None:
                self._run.pair.model, self._run.pair.weights = sample(model)
                self._run.weights.on_change = self._run.pair.forget_weights
            self._check_rules()
            self._check_ready_made(model)
            report.keep_outside_bf16(model)
            self._check_prefixes(model)
            self._leave_to_adapters(model_runner)
            deterministic.keep_rows_apart(self._run, model_runner)
            compact.expect_slots(self._run.recipe, model_runner)
            self._keep_to_own_rows(model)
            packed = self._check_packed(model)
        self._report(model, packed, device)
        self._speculate(model_runner)
        self._run.stages = over_stages(self._run.stage())
        self.unproved = any(over_stages(bool(packed)))
        linears = [m for m in packed if isinstance(m, MixQuantLinearMethod)]
        experts = [m for m in packed if isinstance(m, MixQuantExpertsMethod)]
        tuning.tune_fp4(model_runner, linears, experts)
        self._verify(linears, experts, device)
        self._guard(model)
        self._fuse(model_runner)
        tuning.tune_fp8(self._run, model_runner, linears, device)
        tuning.tune_experts(self._run, model_runner, experts, device)
        prepare_around_attention(self._run, model_runner, device)
        if packed and device.type == "cuda":
            rows = tuning.prefill_rows(model_runner)
            logger.info("mixquant: %s", warm_up(model, linears, experts, rows, device))
        min_tokens.choose(self._run, model_runner, linears, experts, device)

    def finish_attention(self, model_runner: Any) -> None:
        """Completes what ``_fuse`` began, each time that the model's attention back end was built; by then SGLang has
        wrapped what adapters are for."""
        if self._adapted:
            with refusing():
                self._check_wrapped(model_runner.model)
        install_around_attention(self._run, model_runner.attn_backend)
        if self._pruned is None or model_runner.model is not self._pruned:
            return
        reason = attention.prune_last_attention(model_runner.model, model_runner.attn_backend)
        self._run.schedule.prunes_attention = not reason
        said = f"computes all rows: {reason}" if reason else "leaves out unread rows in long prefill passes"
        logger.info("mixquant: the last layer's attention %s", said)

    def prove(self, model_runner: Any, eager_runner: Any) -> None:
        """Runs the model once, and makes the report what ran; see ``probe.py``."""
        self.unproved = False
        with refusing():
            probe.prove(model_runner, eager_runner, self._run, self._assignment)
            deterministic.prove_rows(self._run, self._run.layers)
        self._run.stages = over_stages(self._run.stage())

    # -- checks ----------------------------------------------------------------------------------------------------

    def _finish_weights(self, model: torch.nn.Module) -> None:
        run = self._run
        words = f"mixquant {__version__}, recipe {run.recipe.name} -> {run.selection.describe()}"
        check_same(run.fingerprint, words, rank_group())
        run.weights.agree = agree
        run.known.add_parameters(model, ranks=tensor_parallel_ranks())
        report.note_wholes(model, run.known, self._assignment.matcher)
        quantised.check_all_asked(run)
        quantised.check_all_there(run, model, self._assignment.matcher)
        run.weights.keep(module.quant_method for module in model.modules() if hasattr(module, "quant_method"))
        try:
            run.weights.finish_load()
        except MixQuantError as error:
            if run.weights.out_of_memory and run.shortage is not None:
                raise MixQuantError(f"{error}; {run.shortage()}") from error
            raise

    def _check_rules(self) -> None:
        """Of the layers of all stages of a pipeline."""
        matcher, selection = self._assignment.matcher, self._run.selection
        names = {name: None for stage in over_stages([*self._assignment.names]) for name in stage}
        if matcher is None:
            return
        for name in names.keys() - self._assignment.names.keys():
            matcher.precisions(name, selection.prefill, selection.decode)
        matcher.check_all_matched(names)
        for rule in matcher.unmatched():
            logger.info("mixquant: %s: optional rule %s matches no layer", rule.where, show(rule.match))

    def _check_ready_made(self, model: torch.nn.Module) -> None:
        if self._ready is not None:
            for taken, unused in over_stages((self._ready.taken, self._ready.unused)):
                self._ready.taken.update(taken)
                self._ready.unused.update(unused)
            self._ready.check_all_taken()
            self._ready.check_norms(model.named_parameters())
            self._ready.say_rounding()

    def _check_prefixes(self, model: torch.nn.Module) -> None:
        """Refuses modules that SGLang built under one prefix: ready-made weights are looked up by it."""
        if self._ready is None:
            return
        known: dict[str, str] = {}
        for name, method in report.packed(model):
            if method.low and known.setdefault(method.name, name) != name:
                raise MixQuantError(
                    f"{self._run.recipe.prefill_weights_at}: {known[method.name]} and {name} are both {method.name} to "
                    "SGLang, so ready-made weights cannot be told apart; leave 'weights' out"
                )

    def _check_packed(self, model: torch.nn.Module) -> list[Packed]:
        """The linears and experts that have a low precision; refuses a low recipe of which nothing is left."""
        run = self._run
        methods = [m for m in run.layers if isinstance(m, (MixQuantLinearMethod, MixQuantExpertsMethod))]
        for method in methods:
            if isinstance(method, MixQuantExpertsMethod):
                method.find_choices(model)
        packed: list[Packed] = [m for m in methods if m.low]
        if run.selection.kernels and not any(over_stages(bool(packed))):
            raise MixQuantError(
                f"recipe {run.recipe.name} wants {' and '.join(run.selection.kernels)}, but no layer of this "
                "model can take it; " + ("; ".join(f"{m.name}: {m.refusal}" for m in methods[:3]) or "see the rules")
            )
        return packed

    # -- the rows of other ranks -----------------------------------------------------------------------------------

    def _keep_to_own_rows(self, model: torch.nn.Module) -> None:
        """With DP attention: low is what sees the rows of this rank, and nothing that decodes."""
        schedule = self._run.schedule
        schedule.local = bool(self._run.selection.kernels) and gathers_rows()
        if not schedule.local:
            return
        report.keep_gathered_bf16(model, attention_ranks())
        low = [m.name for _, m in report.packed(model) if m.decodes_low]
        if low:
            raise MixQuantError(
                f"recipe {self._run.recipe.name} decodes {some(low)} in low precision, which does not go with DP "
                "attention: a rank whose packed copies are not current would step without its captured graph, and "
                "the others wait for it; decode in bf16"
            )
        logger.info(
            "mixquant: DP attention: low are the linears beside attention, of the rows of each rank; nothing is fused, "
            "no row left out, and prefill runs without captured graphs, of which a rank cannot do without alone"
        )

    # -- adapters --------------------------------------------------------------------------------------------------

    def _leave_to_adapters(self, model_runner: Any) -> None:
        """Keeps whole what SGLang may wrap for LoRA once this is done, and experts in BF16: it runs those with adapters
        by kernels of its own."""
        if not lora.takes_adapters(model_runner.server_args):
            return
        self._adapted = True
        model, targets = model_runner.model, lora.targets(model_runner.server_args)
        for name, method in report.linears(model):
            method.whole = targets is None or name.rpartition(".")[2] in targets
        for _, experts in report.experts(model):
            if experts.low:
                experts.stay_bf16("LoRA: SGLang runs experts with adapters by kernels of its own")
        what = "any linear" if targets is None else ", ".join(sorted(targets))
        logger.info("mixquant: adapters (LoRA) may be for %s: not fused, and no row left out", what)

    @staticmethod
    def _check_wrapped(model: torch.nn.Module) -> None:
        """Raises ``MixQuantError`` for an adapter on a linear that hands over or takes other things than matrices."""
        for name, linear in lora.wrapped(model):
            method = getattr(linear, "quant_method", None)
            if isinstance(method, MixQuantLinearMethod) and not method.whole:
                raise MixQuantError(
                    f"SGLang puts adapters on {name}, which --lora-target-modules does not name, so that it is fused; "
                    "report this model, and until then leave --lora-target-modules out"
                )

    # -- what is said ----------------------------------------------------------------------------------------------

    def _report(self, model: torch.nn.Module, packed: Sequence[Packed], device: torch.device) -> None:
        run = self._run
        run.schedule.split = any(m.split for m in packed)
        total = report.describe(model, run, self._assignment.left)
        self.loading = False
        if run.selection.kernels:
            report.log_precisions(run, total)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
                logger.info("mixquant: memory peaked %.1f MiB above the loaded size while loading", peak / 2**20)
            report.log_reasons(run, run.stays_bf16)
        quantised.tell(run.quantised)
        if self._ready is not None:
            logger.info("mixquant: NVFP4 weights come from %s (%s)", self._ready.folder, self._ready.layout.name)
            for reason in sorted({*self._ready.unused.values()}):
                names = sorted(name for name, why in self._ready.unused.items() if why == reason)
                logger.info("mixquant: not taken from there (%s): %s", reason, some(names))

    def _speculate(self, model_runner: Any) -> None:
        name = speculation.algorithm(model_runner)
        if name is None:
            return
        self._run.phases = (*self._run.phases, Role.VERIFY.value)
        verify = self._run.schedule.words[Role.VERIFY]
        logger.info("mixquant: speculative decoding (%s): drafted rows are verified in %s", name, verify)

    # -- kernels ---------------------------------------------------------------------------------------------------

    def _verify(
        self,
        packed: Sequence[MixQuantLinearMethod],
        experts: Sequence[MixQuantExpertsMethod],
        device: torch.device,
    ) -> None:
        """Compares the native NVFP4 kernels with the emulated ones, on one linear and one MoE layer of each shape."""
        if not self._run.recipe.verify or self._run.selection.kernels.get("nvfp4") != "native":
            return
        first = {m.shape: m for m in reversed(packed) if m.runs("nvfp4", "native") and not m.masterless}
        with refusing():
            count, worst = verify((m.verification() for m in reversed(first.values())), device)
        logger.info(
            "mixquant: native nvfp4 agrees with the emulated kernel for %d shapes (worst relative error %.2g)",
            count,
            worst,
        )
        layers = {m.sizes: m for m in reversed(experts) if m.runs("nvfp4", "native")}
        if layers:
            with refusing():
                count, worst = verify_experts((m.verification() for m in layers.values()), device)
            logger.info(
                "mixquant: native nvfp4 experts agree with the emulated ones for %d shapes (worst relative error %.2g)",
                count,
                worst,
            )

    def _guard(self, model: torch.nn.Module) -> None:
        guarded = bypasses.guard(model)
        if guarded:
            logger.info("mixquant: SGLang's fused input projections of %d layers run in BF16 passes alone", guarded)

    def _fuse(self, model_runner: Any) -> None:
        schedule = self._run.schedule
        if not self._run.recipe.fuse or schedule.local or self._run.environment.invariant:
            return
        if watching := refusals.watching(model_runner.server_args):
            logger.info("mixquant: nothing fused and no row left out, so that %s sees all", " and ".join(watching))
            return
        done = fused.fuse(model_runner.model)
        if schedule.split and model_runner.is_generation and not self._all_rows_read(model_runner):
            schedule.prunes = last_layer.prune_last_layer(model_runner.model)
        if schedule.prunes:
            self._pruned = model_runner.model
        if done or schedule.prunes:
            what = [f"{n} {kind}" for kind, n in done.items()]
            what += ["unread rows left out behind the last layer's attention"] if schedule.prunes else []
            logger.info("mixquant: fused in prefill: %s", ", ".join(what))
        if self._run.selection.kernels:
            report.log_unfused(model_runner.model)

    def _all_rows_read(self, model_runner: Any) -> bool:
        """Whether every prompt row's result of the last layer is looked at, by a draft or by adapters.

        Decided before prefill graphs are captured: they hold what is left out."""
        if speculation.draft_reads_hidden_states(model_runner):
            logger.info("mixquant: no row of the last layer is left out: the draft reads hidden states of all rows")
            return True
        return self._adapted
