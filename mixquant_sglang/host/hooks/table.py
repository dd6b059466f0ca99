"""Where we hook into SGLang: each hook with its targets and what it is for.

The first target that exists is taken; a hook none of whose targets exists ends the start with the version, the names
and what they are for.  ``patches/README.md`` is the ledger of these hooks, ``registry.py`` sets them.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib.util import find_spec

from mixquant_sglang.versions.dialect import hook_targets


@dataclass(frozen=True)
class Hook:
    """``handler`` names a function of this package.  ``process``: "launcher" hooks are set in every process that
    may parse server arguments, "asked" hooks once it asked for mixquant, "http" hooks there too if it will serve HTTP,
    "scheduler" hooks in the schedulers.  ``only_with``: a dotted name; an SGLang without it has nothing to hook, one
    with it must have a target."""

    handler: str
    kind: str
    process: str
    targets: tuple[str, ...]
    why: str
    only_with: str = ""

    @property
    def needed(self) -> bool:
        return not self.only_with or _exists(self.only_with)


def _exists(name: str) -> bool:
    """Whether there is such a module, which is not imported, or such a name in one."""
    try:
        if find_spec(name) is not None:
            return True
    except ModuleNotFoundError:  # a package that it would be in
        pass
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


HOOKS = (
    Hook("add_recipe_flag", "after", "launcher", ("sglang.srt.server_args.ServerArgs.add_cli_args",), "adds our flag"),
    Hook(
        "resolve_server_args",
        "around",
        "launcher",
        hook_targets("resolve_server_args"),
        "checks recipe and flags before anything is started",
    ),
    Hook(
        "carry_plugin",
        "after",
        "launcher",
        hook_targets("resolve_server_args"),
        "loads the plugin in tokenizer workers and Ray actors",
    ),
    Hook(
        "check_checkpoint",
        "before",
        "asked",
        ("sglang.srt.configs.model_config.ModelConfig._verify_quantization",),
        "refuses checkpoints that are not plain BF16",
    ),
    Hook(
        "choose_architecture",
        "around",
        "asked",
        ("sglang.srt.model_loader.utils.get_model_architecture",),
        "loads Mixtral as the BF16 model that it is",
    ),
    Hook(
        "check_request",
        "after",
        "asked",
        ("sglang.srt.sampling.sampling_params.SamplingParams.verify",),
        "answers 400 to a bad custom_params.mixquant, and hands on one that the HTTP body had",
    ),
    Hook(
        "read_policies",
        "before",
        "http",
        ("sglang.srt.entrypoints.http_server._setup_and_run_http_server",),
        "reads custom_params.mixquant of the bodies whose endpoints drop it",
    ),
    Hook(
        "namespace_request",
        "after",
        "scheduler",
        ("sglang.srt.managers.schedule_batch.Req.__init__",),
        "names each request's KV by what makes it",
    ),
    Hook(
        "session_turn",
        "after",
        "scheduler",
        ("sglang.srt.session.session_controller.Session.create_req",),
        "answers 400 to a turn that would reuse a streaming session's KV of another policy",
    ),
    Hook(
        "rebootstrap_payload",
        "after",
        "scheduler",
        ("sglang.srt.managers.schedule_batch.Req.build_rebootstrap_payload",),
        "has a prefill server name the KV that it makes again by its own recipe, and keep generated tokens in BF16",
    ),
    Hook(
        "open_registry",
        "after",
        "asked",
        ("sglang.srt.disaggregation.common.conn.CommonKVBootstrapServer._setup_routes",),
        "lets a prefill server say what it is where decode servers ask for its ranks",
    ),
    Hook(
        "say_what_we_are",
        "before",
        "scheduler",
        ("sglang.srt.disaggregation.common.conn.CommonKVManager.register_to_bootstrap",),
        "tells a prefill server's registry its recipe and model",
    ),
    Hook(
        "check_pair",
        "around",
        "scheduler",
        ("sglang.srt.disaggregation.common.conn.CommonKVManager.try_ensure_parallel_info",),
        "asks a prefill server what it is before keys and values are taken from it",
    ),
    Hook(
        "refuse_pair",
        "after",
        "scheduler",
        ("sglang.srt.disaggregation.common.conn.CommonKVReceiver.init",),
        "ends requests to a prefill server of another recipe or model",
    ),
    Hook(
        "attach_storage",
        "around",
        "scheduler",
        ("sglang.srt.managers.scheduler.Scheduler.attach_hicache_storage_wrapped",),
        "refuses a cache store whose pages are named by tokens alone",
    ),
    Hook(
        "schedule_batch",
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
        "publishes the roles of a forward pass's rows and counts it",
    ),
    Hook(
        "load_within_memory",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.model_runner.ModelRunner.load_model",),
        "says what the recipe takes and what would fit when loading runs out of memory",
    ),
    Hook(
        "size_pool",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.pool_configurator.MemoryPoolConfig.__post_init__",),
        "says the same when no memory is left for the KV cache",
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
        "can_run_dual_gemm",
        "around",
        "scheduler",
        hook_targets("can_run_dual_gemm"),
        "keeps the fused BF16 gate and up projections to passes that are BF16",
        only_with="sglang.kernels.ops.gemm.cutedsl_dual_gemm",
    ),
    Hook(
        "run_fused_a_gemm",
        "around",
        "scheduler",
        ("sglang.kernels.ops.gemm.fused_a_gemm.linear_with_fused_a_gemm",),
        "keeps a BF16 kernel of few rows to passes that are BF16",
    ),
    Hook(
        "size_prefill_graphs",
        "before",
        "scheduler",
        ("sglang.srt.model_executor.model_runner_components.cuda_graph_setup.capture_prefill_graph",),
        "has a prefill graph captured for the largest pass that min_tokens keeps in BF16",
    ),
    Hook(
        "prove_model",
        "before",
        "scheduler",
        ("sglang.srt.model_executor.model_runner_components.cuda_graph_setup.capture_prefill_graph",),
        "runs a tiny prompt to see which linears SGLang multiplies past the plugin",
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
        "read_checkpoint",
        "around",
        "scheduler",
        ("sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator",),
        "remembers what the checkpoint holds, and makes SGLang's rollback of an update read the old one",
    ),
    Hook(
        "weights_from_disk",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk",),
        "reads a new checkpoint before SGLang overwrites the weights with it",
    ),
    Hook(
        "weights_from_tensor",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_tensor",),
        "looks at new weights before they are written, and packs them",
    ),
    Hook(
        "weights_from_distributed",
        "around",
        "scheduler",
        hook_targets("weights_from_distributed"),
        "looks at new weights before they are written, and packs them",
    ),
    Hook(
        "weights_from_ipc",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_ipc",),
        "takes new weights when all of them are there, looks at them before they are written, and packs them",
    ),
    Hook(
        "weights_direct",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.model_runner_components.weight_updater._model_load_weights_direct",),
        "looks at new weights before they are written",
    ),
    Hook(
        "weights_begin",
        "before",
        "scheduler",
        hook_targets("weights_begin"),
        "keeps packed weights out of use while an update is open",
        only_with="sglang.srt.managers.io_struct.BeginWeightUpdateReqInput",
    ),
    Hook(
        "weights_end",
        "after",
        "scheduler",
        hook_targets("weights_end"),
        "packs the weights of an update when it ends",
        only_with="sglang.srt.managers.io_struct.BeginWeightUpdateReqInput",
    ),
    Hook(
        "weights_released",
        "after",
        "scheduler",
        (
            "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
            ".release_memory_occupation",
        ),
        "keeps packed weights out of use while their memory is released",
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
        "can_replay_decode",
        "around",
        "scheduler",
        ("sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",),
        "runs decode steps eagerly whose captured graphs hold packed weights that are not those of the model",
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
