"""Where we hook into SGLang, and the proof that each hook took effect.

Each hook lists its targets; the first that exists is taken, and a hook none of whose targets exists ends the start with
the version, the names and what they are for.  ``patches/README.md`` is the ledger of these hooks.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixquant_sglang import __version__, compat
from mixquant_sglang.errors import MixQuantError


@dataclass(frozen=True)
class Hook:
    """``handler`` names a function of this package.  ``process``: "launcher" hooks are set in every process that
    may parse server arguments, "asked" hooks once it asked for mixquant, "scheduler" hooks in the schedulers."""

    handler: str
    kind: str
    process: str
    targets: tuple[str, ...]
    why: str


HOOKS = (
    Hook(
        "add_recipe_flag",
        "after",
        "launcher",
        ("sglang.srt.server_args.ServerArgs.add_cli_args",),
        "adds --mixquant-recipe",
    ),
    Hook(
        "resolve_server_args",
        "around",
        "launcher",
        ("sglang.srt.server_args.ServerArgs.resolve_once", "sglang.srt.server_args.ServerArgs.__post_init__"),
        "checks recipe and flags before anything is started",
    ),
    Hook(
        "check_checkpoint",
        "before",
        "asked",
        ("sglang.srt.configs.model_config.ModelConfig._verify_quantization",),
        "refuses checkpoints that are not plain BF16",
    ),
    Hook(
        "check_request",
        "after",
        "asked",
        ("sglang.srt.sampling.sampling_params.SamplingParams.verify",),
        "answers 400 to a bad custom_params.mixquant",
    ),
    Hook(
        "namespace_request",
        "after",
        "scheduler",
        ("sglang.srt.managers.schedule_batch.Req.__init__",),
        "gives requests with BF16 prefill a cache namespace of their own",
    ),
    Hook(
        "plan_batch",
        "after",
        "scheduler",
        ("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",),
        "finds the protected rows of a batch while its requests are at hand",
    ),
    Hook(
        "run_pass",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.model_runner.ModelRunner.forward",),
        "publishes the phase of a forward pass and counts it",
    ),
    Hook(
        "finish_load",
        "after",
        "scheduler",
        ("sglang.srt.model_executor.model_runner.ModelRunner.load_model",),
        "checks the recipe against the model and reports what was packed",
    ),
    Hook(
        "finish_attention",
        "after",
        "scheduler",
        ("sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",),
        "lets the last layer's attention leave out rows that nobody reads",
    ),
    Hook(
        "capture_prefill",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner._run_forward",),
        "captures prefill graphs with low-precision linears and the row index buffer",
    ),
    Hook(
        "can_replay_prefill",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.can_run_graph",),
        "runs passes eagerly that no captured prefill graph computes",
    ),
    Hook(
        "load_prefill_rows",
        "before",
        "scheduler",
        ("sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner.load_batch",),
        "fills the row index buffer before a prefill graph is replayed",
    ),
    Hook(
        "weights_from_tensor",
        "after",
        "scheduler",
        ("sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor",),
        "packs the weights again after an update that skips process_weights_after_loading",
    ),
    Hook(
        "weights_from_distributed",
        "after",
        "scheduler",
        (
            "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
            ".update_weights_from_distributed",
            "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
            ".load_weights_from_distributed",
        ),
        "packs the weights again after an update that skips process_weights_after_loading",
    ),
    Hook(
        "weights_resumed",
        "after",
        "scheduler",
        (
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
            ".resume_memory_occupation",
        ),
        "packs the weights again after their memory was released",
    ),
    Hook(
        "add_internal_state",
        "after",
        "scheduler",
        ("sglang.srt.managers.scheduler.Scheduler.get_internal_state",),
        "adds internal_states[i].mixquant to /server_info",
    ),
    Hook(
        "attach_metrics",
        "after",
        "scheduler",
        ("sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.init_new",),
        "creates the mixquant: series with SGLang's labels",
    ),
    Hook(
        "log_prefill",
        "around",
        "scheduler",
        ("sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter.report_prefill_stats",),
        "adds low and protected rows to SGLang's prefill log line",
    ),
)


_handlers: dict[str, Callable[..., Any]] = {}


def target_of(hook: Hook) -> str:
    """The dotted name that ``hook`` takes in this SGLang; raises ``MixQuantError`` if it has none of them."""
    for target in hook.targets:
        owner, _, attribute = target.rpartition(".")
        try:
            found = hasattr(pkgutil.resolve_name(owner), attribute)
        except (ImportError, AttributeError):
            found = False
        # object.__init__ and the like do not count, and a class must define what we replace.
        if found:
            return target
    raise MixQuantError(
        f"SGLang {compat.sglang_version()} has no {' nor '.join(hook.targets)}, which mixquant {__version__} needs: it "
        f"{hook.why}. Tested with SGLang {' and '.join(compat.TESTED)}: pip install 'sglang=={[*compat.TESTED][-1]}'"
    )


def hooks_of(*processes: str) -> list[Hook]:
    return [hook for hook in HOOKS if hook.process in processes]


def register_hooks(hooks: list[Hook]) -> None:
    """Registers them with SGLang's HookRegistry, which applies them when all plugins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(target_of(hook), handler_of(hook), HookType(hook.kind))


def apply_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function as the handler of the hook of its name."""
    _handlers[function.__name__] = function
    return function


def handler_of(hook: Hook) -> Callable[..., Any]:
    return _handlers[hook.handler]


def took_effect(hook: Hook) -> bool:
    """Whether calling the target calls our handler: SGLang only logs a hook that it could not apply."""
    function: Any = pkgutil.resolve_name(target_of(hook))
    ours = _handlers.get(hook.handler)
    while ours is not None and function is not None:
        function = getattr(function, "__func__", function)
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is ours for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def check_hooks_took_effect(*processes: str) -> None:
    """Raises ``MixQuantError`` for a hook that is missing in this process (by default: one that serves a model)."""
    for hook in hooks_of(*(processes or ("scheduler",))):
        if not took_effect(hook):
            raise MixQuantError(
                f"the hook on {target_of(hook)} is not in place, so mixquant cannot do its work ({hook.why}). "
                f"Start SGLang with --quantization {compat.NAME} and with the plugin loaded "
                "(SGLANG_PLUGINS, if set, must contain mixquant; a json override of the model config is not enough)"
            )
