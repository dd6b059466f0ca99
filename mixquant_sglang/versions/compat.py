"""The only file that knows that SGLang versions differ: how to read what differs.

Decisions go by what a version has, never by its version string.  Where we hook in: ``host/hooks/table.py``.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.passes.queries import Queries
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.recipe.select import Device

NAME = "mixquant"
# SGLang version -> the kinds of device on which the tests ran with it.
TESTED: dict[str, tuple[str, ...]] = {"0.5.17": ("CPU", "GPU"), "0.5.23": ("CPU", "GPU")}

# Set by the process that parsed the server arguments, inherited by the schedulers that it spawns.
ACTIVE_ENV = "MIXQUANT_ACTIVE"


def sglang_version() -> str:
    return version("sglang")


def untested(device: Device) -> str:
    """What is to be known before one relies on this SGLang on ``device``; empty where the tests ran."""
    found, kind = sglang_version(), "CPU" if device.capability is None else "GPU"
    on_kind = [f"SGLang {version}" for version, kinds in TESTED.items() if kind in kinds]
    if found not in TESTED:
        return f"SGLang {found}: not tested; on a {kind}, tested with {' and '.join(on_kind)}"
    if kind not in TESTED[found]:
        return f"SGLang {found}: tested on {' and '.join(TESTED[found])} only; on a {kind}, {' and '.join(on_kind)}"
    return ""


def is_scheduler_process() -> bool:
    """Whether this process was spawned to run a model for a launcher that asked for mixquant."""
    return os.environ.get(ACTIVE_ENV) == "1" and "sglang.srt.managers.scheduler" in sys.modules


def resolved(server_args: Any) -> Any:
    """``server_args`` with what SGLang made of them so far.

    0.5.23 never writes its decisions to the record; 0.5.17 writes those of some fields at the end
    (``materialize_declarations``), from when on the record alone is right.
    """
    if getattr(server_args, "_declarations_materialized", False):
        return server_args
    for module in ("sglang.srt.arg_groups.model_override_base", "sglang.srt.arg_groups.overrides"):
        try:
            view: Callable[[Any], Any] = pkgutil.resolve_name(f"{module}.resolved_view")
        except (ImportError, AttributeError):
            continue
        return view(server_args)
    return server_args


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


def prefill_graph_of(runner: Any, tokens: int) -> int:
    """Rows of the captured prefill graph that SGLang takes for ``tokens`` rows, at most as many as the largest has."""
    return int(runner._pad_to_bucket(tokens, runner.capture_num_tokens))


def prefill_graphs(model_runner: Any) -> Any:
    """SGLang's ``PhaseConfig`` of the prefill graphs: ``backend``, and the sizes ``bs`` to capture, in rows."""
    if not hasattr(model_runner.server_args, "resolve_once"):
        return model_runner.server_args.cuda_graph_config.prefill
    from sglang.srt.runtime_context import get_exec  # 0.5.23: server arguments stay as they were given

    return get_exec().graph.cuda_graph_config.prefill


def add_prefill_graph(model_runner: Any, rows: int) -> None:
    """Has SGLang capture a breakable prefill graph of ``rows`` rows too, if it is to capture larger ones.

    Call it before ``capture_prefill_graph`` reads the list of sizes."""
    config = prefill_graphs(model_runner)
    if config.backend == "breakable" and config.bs and 0 < rows < max(config.bs):
        config.bs = sorted({*config.bs, rows})


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


def rank_group() -> Any | None:
    """The CPU process group of all ranks that run this model together; None where there is none."""
    from sglang.srt.distributed import parallel_state

    world = getattr(parallel_state, "_WORLD", None)
    return None if world is None else world.cpu_group


def dumps_modules() -> bool:
    """Whether SGLang's dumper (``DUMPER_ENABLE``) looks at what modules return."""
    try:
        dumper = pkgutil.resolve_name("sglang.srt.debug_utils.dumper.dumper")
    except (ImportError, AttributeError):
        return False
    return bool(getattr(dumper, "may_enable", False))


# -- where KV is kept --------------------------------------------------------------------------------------------------

UNNAMED_PAGES = (
    "this SGLang names stored pages by their tokens alone, so KV of other recipes would be read; 0.5.23 does not"
)


def stored_pages_are_named() -> bool:
    """Whether pages in stores that outlive the process are named by ``extra_key`` too: their chain of hashes begins
    with it in 0.5.23 (``mem_cache/utils.py``), with the tokens in 0.5.17."""
    from sglang.srt.mem_cache import utils

    seed = getattr(utils, "storage_namespace_seed", None)
    return seed is not None and seed("a", None) != seed("b", None)


def refused_storage(message: str) -> Any:
    """What ``Scheduler.attach_hicache_storage_wrapped`` answers when it attached nothing."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqOutput

    return AttachHiCacheStorageReqOutput(success=False, message=message)


def tree_ignores_keys() -> bool:
    """Whether the environment asks for 0.5.17's experimental C++ radix tree, which looks at tokens alone."""
    from sglang.srt.environ import envs

    asked = getattr(envs, "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", None)
    return asked is not None and bool(asked.get())


def serves_by_rust() -> bool:
    """Whether the environment asks for SGLang's server in Rust: HTTP and tokenizer are threads of the scheduler then,
    and ``http_server._setup_and_run_http_server`` never runs."""
    from sglang.srt.environ import envs

    asked = getattr(envs, "SGLANG_RUST_SERVER", None)
    return asked is not None and bool(asked.get())


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


# -- weights -----------------------------------------------------------------------------------------------------------


def read_weights(updater: Any, model_path: str, load_format: str) -> Any | None:
    """The tensors that ``WeightUpdater.update_weights_from_disk`` would read; None where it refuses the format."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    loader = get_model_loader(LoadConfig(load_format=load_format), updater.model_config)
    if not isinstance(loader, DefaultModelLoader):
        return None
    source = DefaultModelLoader.Source.init_new(updater.model_config, updater.get_model())
    return loader._get_weights_iterator(dataclasses.replace(source, model_or_path=model_path))


def concerns_weights(recv_req: Any) -> bool:
    """Whether a request to release or resume memory is about that of the weights."""
    return not recv_req.tags or "weights" in recv_req.tags


@contextmanager
def ipc_without_post_hook() -> Iterator[None]:
    """SGLang's update by IPC (``checkpoint_engine_worker``) loads what it is given and leaves ``postprocess`` out: of
    the old weights, which are prepared already, layers need not bear it (experts that are shuffled in place)."""
    try:
        from sglang.srt.checkpoint_engine.checkpoint_engine_worker import SGLangCheckpointEngineWorkerExtensionImpl
    except ImportError:  # SGLang's answer says so
        yield
        return
    own = SGLangCheckpointEngineWorkerExtensionImpl.get_post_hook
    SGLangCheckpointEngineWorkerExtensionImpl.get_post_hook = lambda _: lambda: None
    try:
        yield
    finally:
        SGLangCheckpointEngineWorkerExtensionImpl.get_post_hook = own


def postprocess(model: Any) -> None:
    """What SGLang does after it loaded weights by IPC (``checkpoint_engine_worker``), whose errors it only logs."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    if hasattr(model, "post_load_weights"):
        model.post_load_weights()


def tensor_parallel_ranks() -> int:
    import torch.distributed
    from sglang.srt.distributed import get_tp_group

    return int(get_tp_group().world_size) if torch.distributed.is_initialized() else 1


def agree(problem: str | None) -> str | None:
    """The first rank's problem of the tensor parallel group, the same on all of its ranks."""
    if tensor_parallel_ranks() == 1:
        return problem
    import torch.distributed
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    found: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(found, problem, group=group.cpu_group)
    return next(filter(None, found), None)


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


def fp4_environment(*, own_quantizer: bool = True) -> Environment:
    """SGLang's ModelOpt FP4 linear method for the native kernel; refuses back ends that cannot serve it.

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
    return Environment(lambda: ModelOptFp4LinearMethod(config), own_quantizer)


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


# -- batches without a scheduler ---------------------------------------------------------------------------------------


def prefill_batch(prompts: list[tuple[Any, int]], model_runner: Any) -> tuple[Any, Any]:
    """(ScheduleBatch, ForwardBatch) of an extend pass over the first rows of each prompt: (token ids, rows).

    As ``sglang.benchmark.one_batch.extend`` builds it, whose stand-in for the radix cache it takes.
    """
    from sglang.benchmark.one_batch import TreeCacheNamespace
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    requests = []
    for i, (ids, new) in enumerate(prompts):
        req = Req(str(i), "", ids, SamplingParams(temperature=0, max_new_tokens=8))
        req.full_untruncated_fill_ids = req.origin_input_ids
        req.logprob_start_len = -1
        if hasattr(req, "set_extend_range"):  # 0.5.17
            req.set_extend_range(0, new)
        else:
            req.extend_end = new
        requests.append(req)
    batch = ScheduleBatch.init_new(
        reqs=requests,
        req_to_token_pool=model_runner.req_to_token_pool,
        token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        tree_cache=TreeCacheNamespace(
            page_size=model_runner.token_to_kv_pool_allocator.page_size,
            device=model_runner.device,
            token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        ),
        model_config=model_runner.model_config,
        enable_overlap=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None and getattr(batch, "prefill_input_ids_cpu", None) is not None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    return batch, ForwardBatch.init_new(batch, model_runner, return_hidden_states_before_norm=False)


def decode_batch(batch: Any, model_runner: Any) -> Any:
    """The ForwardBatch of a decode step after ``batch``: token 1 for each request, nothing sampled."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    batch.input_ids = torch.ones(len(batch.reqs), dtype=torch.int64, device=batch.device)
    batch.prepare_for_decode()
    return ForwardBatch.init_new(batch, model_runner, return_hidden_states_before_norm=False)


class Pools:
    """A model runner's pools of requests and of KV, before the first request."""

    def __init__(self, model_runner: Any) -> None:
        self._pools = model_runner.req_to_token_pool, model_runner.token_to_kv_pool_allocator

    @property
    def free_tokens(self) -> int:
        return int(self._pools[1].available_size())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Gives back what was taken; raises ``RuntimeError`` if the pools are then not what they were."""
        before = [pool.available_size() for pool in self._pools]
        try:
            yield
        finally:
            for pool in self._pools:
                pool.clear()
        after = [pool.available_size() for pool in self._pools]
        if after != before:
            raise RuntimeError(f"mixquant: running a tiny prompt left the pools with {after} free instead of {before}")
