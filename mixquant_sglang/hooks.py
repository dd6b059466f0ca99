"""What our hooks do inside SGLang, one short function per row of ``compat.HOOKS`` and of ``patches/README.md``.

BEFORE handlers take the target's arguments, AFTER handlers its result first, AROUND handlers the target itself first.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from mixquant_sglang import __version__, compat, phase, recipe, runtime
from mixquant_sglang.compat import handler
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.phase import Phase
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.refusals import check_server_args, refusing
from mixquant_sglang.runtime import PassPlan

REQUEST_KEY = "mixquant"
_PLAN = "_mixquant_plan"  # attribute of the ForwardBatch between init_new and ModelRunner.forward

_command_line = False  # server arguments came from a command line, so a refusal ends the process with one line
_flag_given = False
_dtype_asked: str | None = None
_recipe: Recipe | None = None
_labels: Mapping[str, Any] | None = None


# -- launcher ----------------------------------------------------------------------------------------------------------


class _RecipeFlag(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        global _flag_given
        _flag_given = True
        os.environ[recipe.RECIPE_ENV] = values
        setattr(namespace, self.dest, values)


@handler
def add_recipe_flag(_result: None, parser: argparse.ArgumentParser) -> None:
    global _command_line
    _command_line = True
    parser.add_argument(
        "--mixquant-recipe",
        action=_RecipeFlag,
        metavar="NAME|FILE",
        help="Recipe for --quantization mixquant: a shipped name (mixquant recipes lists them) or a YAML file. "
        f"Default: the environment variable {recipe.RECIPE_ENV}, else 'auto'.",
    )


def _refusing() -> AbstractContextManager[None]:
    return refusing() if _command_line else nullcontext()


@handler
def resolve_server_args(original: Callable[..., None], server_args: Any, *args: Any, **kwargs: Any) -> None:
    global _dtype_asked, _recipe
    if getattr(server_args, "_resolution_finished", False):  # 0.5.23 asks again wherever the arguments arrive
        return original(server_args, *args, **kwargs)
    asked = server_args.quantization == compat.NAME
    os.environ.pop(compat.ACTIVE_ENV, None)
    with _refusing():
        if _flag_given and not asked:
            raise MixQuantError(f"--mixquant-recipe needs --quantization {compat.NAME}")
        if asked:
            _recipe = recipe.load(recipe.requested())
            check_server_args(server_args)
            for hook in compat.HOOKS:
                compat.target_of(hook)
            _dtype_asked = server_args.dtype
            _prepare_launcher()
        original(server_args, *args, **kwargs)
        if asked:
            check_server_args(server_args)
            os.environ[compat.ACTIVE_ENV] = "1"


def _prepare_launcher() -> None:
    waiting = [hook for hook in compat.hooks_of("asked") if not compat.took_effect(hook)]
    compat.register_hooks(waiting)
    compat.apply_hooks()
    compat.check_hooks_took_effect("launcher", "asked")
    register_config()


def register_config() -> None:
    # Imported late: it needs SGLang's layers, which an idle plugin must not load.
    from mixquant_sglang import config

    config.register()


@handler
def check_checkpoint(model_config: Any) -> None:
    """Refuses quantised checkpoints, those of another dtype unless ``--dtype bfloat16`` asks for the cast, and
    ready-made prefill weights of another model."""
    if model_config.quantization != compat.NAME:
        return
    with _refusing():
        for config in (model_config.hf_config, model_config.hf_text_config):
            for field in ("quantization_config", "compression_config"):
                found = getattr(config, field, None)
                if found:
                    method = found.get("quant_method") if isinstance(found, dict) else type(found).__name__
                    raise MixQuantError(
                        f"{model_config.model_path} is already quantised ({method}); "
                        "mixquant derives its packed weights from a plain BF16 checkpoint: give it the original one"
                    )
        stored = getattr(model_config.hf_text_config, "dtype", None)
        stored = getattr(torch, stored, stored) if isinstance(stored, str) else stored
        cast_unasked = stored is not torch.bfloat16 and _dtype_asked == "auto"
        if model_config.dtype is not torch.bfloat16 or cast_unasked:
            raise MixQuantError(
                f"{model_config.model_path} is a {str(stored or torch.float32).removeprefix('torch.')} checkpoint that "
                f"would be served as {str(model_config.dtype).removeprefix('torch.')}; mixquant needs BF16: "
                "convert it, or pass --dtype bfloat16 to cast it at load"
            )
        if _recipe is not None and _recipe.prefill_weights:
            from mixquant_sglang.prefill_weights.weights import PrefillWeights

            ready = PrefillWeights.open(_recipe.prefill_weights, _recipe.prefill_weights_at)
            ready.check_model(model_config.hf_text_config)


@handler
def check_request(_result: None, sampling_params: Any, *_args: Any) -> None:
    """Raises ``ValueError``, which SGLang answers with 400, for a bad ``custom_params.mixquant``."""
    custom = sampling_params.custom_params
    if not isinstance(custom, dict) or REQUEST_KEY not in custom:
        return
    policy = custom[REQUEST_KEY]
    if policy != {"prefill": "bf16"}:
        raise ValueError(
            f"custom_params.{REQUEST_KEY} is {policy!r}; "
            "allowed: {'prefill': 'bf16'}, which prefills this request in BF16"
        )
    if _recipe is not None and _recipe.decode != "bf16":
        raise ValueError(
            f"custom_params.{REQUEST_KEY}: this server's recipe {_recipe.name} has decode {_recipe.decode}, "
            "so it has no BF16 path for a request's prefill"
        )


# -- scheduler: requests and passes ------------------------------------------------------------------------------------


@handler
def namespace_request(_result: None, req: Any, *_args: Any, **_kwargs: Any) -> None:
    custom = req.sampling_params.custom_params
    req.mixquant_bf16 = isinstance(custom, dict) and REQUEST_KEY in custom
    if req.mixquant_bf16:
        req.extra_key = f"{req.extra_key or ''}|mixquant=bf16"


@handler
def plan_batch(forward_batch: Any, _cls: type, batch: Any, model_runner: Any, **_kwargs: Any) -> None:
    run = runtime.current()
    if run is None or _phase_of(forward_batch.forward_mode) is Phase.DECODE:
        return
    requests = compat.request_rows(forward_batch, batch, lambda req: getattr(req, "mixquant_bf16", False))
    reads_all = run.prunes and compat.reads_all_rows(forward_batch)
    plan = run.plan_prefill(requests, torch.device(model_runner.device), reads_all=reads_all)
    setattr(forward_batch, _PLAN, plan)
    if batch.prefill_stats is not None:
        batch.prefill_stats.mixquant = plan


@cache
def _phase_of(mode: Any) -> Phase:
    return phase.phase_of(mode.name)


@handler
def run_pass(original: Callable[..., Any], model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    run = runtime.current()
    if run is None:
        return original(model_runner, forward_batch, *args, **kwargs)
    run.refresh_if_changed()
    mode = forward_batch.forward_mode
    if _phase_of(mode) is Phase.DECODE:
        # The decode column holds outside of any scope.
        if mode.name != "IDLE":
            run.count_decode(len(forward_batch.input_ids))
        return original(model_runner, forward_batch, *args, **kwargs)
    plan: PassPlan | None = getattr(forward_batch, _PLAN, None)
    if plan is None:
        raise RuntimeError(f"mixquant: a {mode.name} batch reached the model without the facts of its requests")
    if not forward_batch.split_index:  # SPLIT_PREFILL runs one batch in several calls
        run.count_prefill(plan)
    with phase.scope(plan.running):
        return original(model_runner, forward_batch, *args, **kwargs)


# -- scheduler: prefill CUDA graphs ------------------------------------------------------------------------------------


@handler
def capture_prefill(
    original: Callable[..., Any], runner: Any, forward_batch: Any, num_tokens: int, *args: Any, **kwargs: Any
) -> Any:
    run = runtime.current()
    if run is None:
        return original(runner, forward_batch, num_tokens, *args, **kwargs)
    backend = str(getattr(runner.prefill_backend_name, "value", runner.prefill_backend_name))
    if run.split and backend != "breakable":
        raise SystemExit(
            f"mixquant: the prefill CUDA graph backend is {backend}; row protection is tested with breakable graphs "
            "and without: pass --cuda-graph-backend-prefill breakable (or disabled)"
        )
    device = torch.device(runner.model_runner.device)
    with phase.scope(run.captured_pass(num_tokens, runner.max_num_tokens, device)):
        return original(runner, forward_batch, num_tokens, *args, **kwargs)


@handler
def can_replay_prefill(original: Callable[..., bool], runner: Any, forward_batch: Any) -> bool:
    if not original(runner, forward_batch):
        return False
    run = runtime.current()
    return run is None or run.can_replay(getattr(forward_batch, _PLAN))


@handler
def load_prefill_rows(_runner: Any, forward_batch: Any, **_kwargs: Any) -> None:
    run = runtime.current()
    if run is not None:
        run.load_graph(getattr(forward_batch, _PLAN))


# -- scheduler: weights ------------------------------------------------------------------------------------------------


@handler
def finish_load(_result: None, model_runner: Any) -> None:
    run = runtime.current()
    if run is not None and run.finish_load is not None:
        run.finish_load(model_runner)
        _publish_metrics()


@handler
def finish_attention(_result: None, model_runner: Any) -> None:
    run = runtime.current()
    if run is not None and run.finish_attention is not None:
        run.finish_attention(model_runner)


def _weights_changed() -> None:
    run = runtime.current()
    if run is not None:
        run.weights_changed()


@handler
def weights_from_tensor(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    _weights_changed()


@handler
def weights_from_distributed(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    _weights_changed()


@handler
def weights_resumed(_result: Any, *_args: Any, **_kwargs: Any) -> None:
    _weights_changed()


# -- scheduler: what users see -----------------------------------------------------------------------------------------


@handler
def add_internal_state(result: Any, *_args: Any) -> None:
    run = runtime.current()
    if run is not None:
        result.internal_state["mixquant"] = run.state()


@handler
def attach_metrics(context: Any, *_args: Any, **_kwargs: Any) -> None:
    global _labels
    if context.collector is not None and context.current_scheduler_metrics_enabled:
        _labels = context.collector.labels
        _publish_metrics()


def _publish_metrics() -> None:
    """Once SGLang's labels are known and the model is loaded, whichever comes last."""
    global _labels
    run = runtime.current()
    if run is None or run.finish_load is not None or _labels is None:
        return
    run.counters.attach(_labels).describe(
        version=__version__,
        recipe=run.recipe.name,
        kernel=",".join(f"{precision}:{kernel}" for precision, kernel in run.selection.kernels.items()) or "none",
        layers=run.precisions,
        extra_bytes=run.extra_weight_bytes,
    )
    _labels = None


@handler
def log_prefill(original: Callable[..., None], reporter: Any, *args: Any, **kwargs: Any) -> None:
    stats = kwargs.get("prefill_stats", args[1] if len(args) > 1 else None)
    plan: PassPlan | None = getattr(stats, "mixquant", None)
    if plan is None:
        return original(reporter, *args, **kwargs)
    rows = plan.tokens.get(("prefill", plan.precision), 0)
    label = reporter._graph_backend_label
    reporter._graph_backend_label = f"#{plan.precision}-token: {rows}, #protected-row: {plan.protected_total}, {label}"
    try:
        return original(reporter, *args, **kwargs)
    finally:
        reporter._graph_backend_label = label
