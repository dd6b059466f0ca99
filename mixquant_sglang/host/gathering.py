"""When the server's prefill attention gathers keys and values (``layers/gathered_attention.py``), and what is said."""

from __future__ import annotations

import logging
from typing import Any

import torch

from mixquant_sglang.host.refusal import gathers
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.layers.gathered_attention import Kernels, gather_attention, heads_of, prepare
from mixquant_sglang.recipe import pairs
from mixquant_sglang.versions.attention import caches_bf16, flash_attention_3, prefill_attention
from mixquant_sglang.versions.dialect import dialect

logger = logging.getLogger(__name__)


def prepare_gathering(run: Runtime, model_runner: Any, device: torch.device) -> None:
    """Sees whether gathering gives the same bits and pays, with the model's heads; its scratch stays.  A decode server
    of a pair has no prefill."""
    args = dialect().resolved(model_runner.server_args)
    if gathers(model_runner.server_args) or gathers(args):  # passes have more rows than their requests
        return
    if not run.recipe.fuse or device.type != "cuda" or prefill_attention(args) != "fa3":
        return
    if not caches_bf16(args):
        logger.info("mixquant: prefill attention reads pages, as in SGLang: they hold %s", args.kv_cache_dtype)
        return
    if run.pair is not None and run.pair.mode == pairs.DECODE:
        return
    if run.environment.invariant:
        logger.info("mixquant: prefill attention reads pages, as in SGLang: inference is to be deterministic")
        return
    heads = heads_of(model_runner.model)
    if heads is None:
        return
    tokens = min(model_runner.model_config.context_len, args.max_total_tokens or 2**62)
    try:
        found = prepare(heads, tokens, Kernels(*flash_attention_3()), device, args.page_size or 1)
    except torch.OutOfMemoryError:
        found = "too little memory to time another way"
    torch.cuda.empty_cache()
    if isinstance(found, str):
        logger.info("mixquant: prefill attention reads pages, as in SGLang: %s", found)
    else:
        run.gathering = found
        logger.info("mixquant: %s", found.describe())


def install_gathering(run: Runtime, backend: Any) -> None:
    """Each time that the model's attention back end was built."""
    if run.gathering is None:
        return
    reason = gather_attention(backend, run.gathering, Kernels(*flash_attention_3()))
    if reason:
        run.gathering = None
        logger.info("mixquant: prefill attention reads pages, as in SGLang: %s", reason)
