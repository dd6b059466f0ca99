"""Whether the server's prefill runs norms of heads, RoPE and the write of the cache in one kernel
(``layers/norm_rope.py``), and what is said."""

from __future__ import annotations

import logging
from typing import Any

import torch

from mixquant_sglang.host import refusals
from mixquant_sglang.host.refusal import gathers
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.layers.norm_rope import NormRope, find, install, prepare
from mixquant_sglang.recipe import pairs
from mixquant_sglang.recipe.text import some
from mixquant_sglang.versions import batches
from mixquant_sglang.versions.dialect import dialect
from mixquant_sglang.versions.qk import why_not_rows

logger = logging.getLogger(__name__)

_OWN = "mixquant: between qkv_proj and attention run SGLang's own kernels: %s"


def prepare_norm_rope(run: Runtime, model_runner: Any, device: torch.device) -> None:
    """Sees whether one kernel gives the same bits and pays, in the model's blocks.  A decode server of a pair has no
    prefill."""
    if not run.recipe.fuse or device.type != "cuda" or (run.pair is not None and run.pair.mode == pairs.DECODE):
        return
    if run.environment.invariant:
        # compared here with norms that SGLang replaces after load (ModelRunner.maybe_enable_batch_invariant_mode), and
        # passes of fewer rows keep those
        logger.info(_OWN, "inference is to be deterministic")
        return
    args = model_runner.server_args
    attentions, others = find(model_runner.model)
    for reason, names in others.items():
        logger.info(_OWN + " (%s)", reason, some(names))
    if not attentions:
        return
    found: NormRope | str
    if gathers(args) or gathers(dialect().resolved(args)):
        found = "DP attention, whose passes have rows of no request"
    elif watching := refusals.watching(args):
        found = f"{' and '.join(watching)} sees all"
    else:
        try:
            found = prepare(attentions, batches.most_prefill_rows(model_runner), device)
        except torch.OutOfMemoryError:
            found = "too little memory to compare them with one for all"
        torch.cuda.empty_cache()
    if isinstance(found, str):
        logger.info(_OWN, found)
    else:
        run.norm_rope = found
        logger.info("mixquant: %s", found.describe())


def install_norm_rope(run: Runtime, backend: Any) -> None:
    """Each time that the model's attention back end was built."""
    if run.norm_rope is None:
        return
    reason = why_not_rows(backend.token_to_kv_pool)
    if reason:
        run.norm_rope = None
        logger.info(_OWN, reason)
    else:
        install(run.norm_rope)
