"""The only file that knows that SGLang versions differ: where we hook in, and how to read what differs.

Decisions go by what a version has, never by its version string.  Each hook lists its targets; the first that exists is
taken, and a hook none of whose targets exists ends the start with the version, the names and what they are for.
``patches/README.md`` is the ledger of these hooks.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import pkgutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mixquant_sglang import __version__
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels import Device
from mixquant_sglang.rows import Queries, RequestRows

NAME = "mixquant"
TESTED = ("0.5.17", "0.5.23")

# Set by the process that parsed the server arguments, inherited by the schedulers that it spawns.
ACTIVE_ENV = "MIXQUANT_ACTIVE"


@dataclass(frozen=True)
class Hook:
    """``handler`` is the name of a function of hooks.py.  ``process``: "launcher" hooks are set in every process that
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


def sglang_version() -> str:
    return version("sglang")


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
        f"SGLang {sglang_version()} has no {' nor '.join(hook.targets)}, which mixquant {__version__} needs: it "
        f"{hook.why}. Tested with SGLang {' and '.join(TESTED)}: pip install 'sglang=={TESTED[-1]}'"
    )


def hooks_of(*processes: str) -> list[Hook]:
    return [hook for hook in HOOKS if hook.process in processes]


def register_hooks(hooks: list[Hook]) -> None:
    """Registers them with SGLang's HookRegistry, which applies them when all plugins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(target_of(hook), _handlers[hook.handler], HookType(hook.kind))


def apply_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function of hooks.py as the handler of the hook of its name."""
    _handlers[function.__name__] = function
    return function


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
                f"Start SGLang with --quantization {NAME} and with the plugin loaded "
                "(SGLANG_PLUGINS, if set, must contain mixquant; a json override of the model config is not enough)"
            )


def is_scheduler_process() -> bool:
    """Whether this process was spawned to run a model for a launcher that asked for mixquant."""
    return os.environ.get(ACTIVE_ENV) == "1" and "sglang.srt.managers.scheduler" in sys.modules


# -- facts of requests and batches -------------------------------------------------------------------------------------


def request_rows(forward_batch: Any, batch: Any, wants_bf16: Callable[[Any], bool]) -> list[RequestRows]:
    """The requests of an EXTEND, MIXED or SPLIT_PREFILL batch in row order."""
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    return [
        RequestRows(
            new=int(new),
            prefix=int(prefix),
            prompt=len(req.origin_input_ids),
            decoding=id(req) in decoding,
            bf16=wants_bf16(req),
        )
        for req, new, prefix in zip(
            batch.reqs, forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu, strict=True
        )
    ]


def reads_all_rows(forward_batch: Any) -> bool:
    """Whether SGLang looks at more of an extend batch's final hidden states than the last one of each request.

    ``LogitsProcessor._get_pruned_states`` takes that one alone unless input logprobs are asked for.
    """
    if forward_batch.capture_hidden_mode is not None and forward_batch.capture_hidden_mode.need_capture():
        return True
    for name in ("is_prefill_only", "return_pooled_hidden_states", "multi_item_delimiter_indices"):
        if getattr(forward_batch, name, None):
            return True
    if not forward_batch.return_logprob:
        return False
    starts, sizes = forward_batch.extend_logprob_start_lens_cpu, forward_batch.extend_seq_lens_cpu
    return any(start < size - 1 for start, size in zip(starts, sizes, strict=True))


def most_prefill_rows(model_runner: Any) -> int:
    """Token rows of the largest prefill pass that the scheduler makes."""
    args = model_runner.server_args
    chunk = args.chunked_prefill_size
    return int(chunk if chunk is not None and chunk > 0 else args.max_prefill_tokens)


def forward_method(op: Any) -> Callable[..., Any]:
    """What a ``MultiPlatformOp`` (0.5.17) or ``BaseFusedOp`` (0.5.23, which looks it up when first called) runs."""
    if op._forward_method is None:
        op._forward_method = op._resolve_forward_method()
    method: Callable[..., Any] = op._forward_method
    return method


def tensor_parallel(layer: Any) -> tuple[int, int]:
    """(rank, ranks) by which SGLang slices the weight of a linear: attributes in 0.5.17, a group in 0.5.23."""
    if hasattr(layer, "tp_rank"):
        return int(layer.tp_rank), int(layer.tp_size)
    group = getattr(layer, "tp_group", None)
    return (0, 1) if group is None else (int(group.rank_in_group), int(group.world_size))


# -- attention of some rows --------------------------------------------------------------------------------------------

_FLASH_ATTENTION = "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend"
_RADIX_ATTENTION = "sglang.srt.layers.radix_attention.RadixAttention"
# What makes its extend attention more than causal attention over a paged cache of keys and values (0.5.17, 0.5.23).
_SPECIAL_BACKEND = (
    "use_mla",
    "is_encoder_decoder",
    "has_swa",
    "is_prefill_aware_swa",
    "use_sliding_window_kv_pool",
    "has_local_attention",
    "local_attn_builder",
    "fa_skip_kv_cache",
    "kv_cache_is_mxfp8",
    "_kv_shard_pool",
)
_SPECIAL_METADATA = (
    "local_attn_metadata",
    "swa_spec_metadata",
    "encoder_lens_int32",
    "image_token_ranges",
    "scheduler_metadata",
)


def _class_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def attends_whole(backend: Any, attention: Any) -> str:
    """Why ``backend`` is not asked for some query rows of ``attention`` alone; empty if it can be.

    FA3's kernel takes queries and keys of any lengths and aligns the ends of both, so that fewer queries, the last of
    each request, see the keys that they saw before.
    """
    name = _class_name(backend)
    if name != _FLASH_ATTENTION or backend.fa_impl_ver != 3:
        version = f" {backend.fa_impl_ver}" if name == _FLASH_ATTENTION else ""
        return f"the attention back end is {type(backend).__name__}{version}, not FlashAttention 3"
    special = [name for name in _SPECIAL_BACKEND if getattr(backend, name, None)]
    if _class_name(attention) != _RADIX_ATTENTION:
        special.append(type(attention).__name__)
    else:
        special += [name for name in ("is_cross_attention", "use_irope") if getattr(attention, name)]
        special += ["sliding_window_size"] if attention.sliding_window_size not in (None, -1) else []
        special += [f"attn_type {attention.attn_type.value}"] if attention.attn_type.value != "decoder" else []
    return f"it is not plain causal attention ({', '.join(special)})" if special else ""


def metadata_of_queries(backend: Any, queries: Queries) -> Any | None:
    """``forward_metadata`` of FA3's back end for ``queries`` instead of all rows of the pass; None if it holds more
    than what plain causal attention needs."""
    metadata = backend.forward_metadata
    if any(getattr(metadata, name, None) is not None for name in _SPECIAL_METADATA):
        return None
    if metadata.cu_seqlens_q is None or len(metadata.cu_seqlens_q) != queries.requests + 1:
        return None
    return dataclasses.replace(metadata, cu_seqlens_q=queries.starts, max_seq_len_q=queries.longest)


# -- the machine -------------------------------------------------------------------------------------------------------


def device() -> Device:
    """The GPU that this process serves from, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return Device("this CPU", None)
    return Device(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def kernel_versions() -> dict[str, str]:
    """Of what SGLang ships its GEMMs in; needs a GPU."""
    import sgl_kernel

    return {"sgl_kernel": str(sgl_kernel.__version__)}


def bf16_below() -> int:
    """Passes with fewer rows than this bypass the linear methods: SGLang 0.5.23 runs the gate and up projections of
    small batches through a fused BF16 kernel (``layers/dual_gemm.py``), in prefill too."""
    import torch

    if not torch.cuda.is_available():
        return 1
    try:
        limit = pkgutil.resolve_name("sglang.kernels.ops.gemm.cutedsl_dual_gemm.MAX_DUAL_GEMM_DECODE_TOKENS")
    except (ImportError, AttributeError):
        return 1
    return int(limit) + 1


def allow_cpu() -> None:
    """Lets SGLang build rotary embeddings on a machine without an accelerator and without its CPU engine.

    ``RotaryEmbedding.__init__`` imports a vLLM kernel there that it never calls; the module constant is read at that
    one place (``layers/rotary_embedding/base.py``).
    """
    import torch

    accelerators = [torch.cuda.is_available()]
    accelerators += [getattr(torch, name).is_available() for name in ("xpu", "npu") if hasattr(torch, name)]
    if any(accelerators):
        return
    import sglang.srt.layers.rotary_embedding.base as rotary

    rotary._is_cpu = True


def hush_unknown_method_warning() -> None:
    """Drops SGLang's warning that a quantization method outside its own list "is not fully optimized yet"."""
    logging.getLogger("sglang.srt.configs.model_config").addFilter(
        lambda record: not record.getMessage().startswith(f"{NAME} quantization is not fully optimized")
    )


def provide_fp4_linear_method(*, own_quantizer: bool = True) -> None:
    """Hands SGLang's ModelOpt FP4 linear method to the native kernel, and refuses back ends that cannot serve it.

    ``own_quantizer``: activations are quantised by our kernels, fused where that is possible, or by FlashInfer's."""
    from sglang.srt.layers.quantization.fp4_utils import get_fp4_gemm_runner_backend
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config, ModelOptFp4LinearMethod

    from mixquant_sglang.kernels import blackwell

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
    blackwell.fp4_linear_method = lambda: ModelOptFp4LinearMethod(config)
    blackwell.own_quantizer = own_quantizer


def fp4_gemm_measuring(model_runner: Any) -> AbstractContextManager[None] | None:
    """SGLang's context in which FlashInfer measures the GEMMs that it is asked for, and keeps the results in SGLang's
    file of the model and rank; with several ranks they agree on them (0.5.23).  None where SGLang is not to measure:
    ``--disable-flashinfer-autotune``, and ``--enable-deterministic-inference``, since the GEMM measured best depends on
    the number of rows, and with it the order of summation."""
    args = model_runner.server_args
    if args.disable_flashinfer_autotune or args.enable_deterministic_inference:
        return None
    from sglang.srt.model_executor.runner.flashinfer_autotune import flashinfer_autotune_context

    # that a run of the model within it computes logits: no model is run here
    logits = {"skip_logits": False, "run_lm_head": True}
    known = inspect.signature(flashinfer_autotune_context).parameters
    context: AbstractContextManager[None] = flashinfer_autotune_context(
        model_runner, **{name: value for name, value in logits.items() if name in known}
    )
    return context
