"""The only file that knows that SGLang versions differ: how to read what differs.

Decisions go by what a version has, never by its version string.  Where we hook in: ``hooks/table.py``.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels import Device
from mixquant_sglang.rows import Queries, RequestRows

NAME = "mixquant"
TESTED = ("0.5.17", "0.5.23")

# Set by the process that parsed the server arguments, inherited by the schedulers that it spawns.
ACTIVE_ENV = "MIXQUANT_ACTIVE"


def sglang_version() -> str:
    return version("sglang")


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
