"""Whether the server's prefill attention runs in FP8 (``layers/low_attention.py``), where, and what is said."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.attention import attend_emulated, sample_tokens
from mixquant_sglang.kernels.limits import FP8_BYTES
from mixquant_sglang.layers.gathered_attention import Heads, Kernels, heads_of
from mixquant_sglang.layers.low_attention import EMULATED, NATIVE, LowAttention, find_layers, lower_attention
from mixquant_sglang.layers.low_scratch import LowScratch
from mixquant_sglang.passes.attention import LowLimits
from mixquant_sglang.recipe import pairs
from mixquant_sglang.recipe.text import some
from mixquant_sglang.versions import batches
from mixquant_sglang.versions.attention import caches_bf16, flash_attention_3, prefill_attention
from mixquant_sglang.versions.dialect import dialect

logger = logging.getLogger(__name__)

_HOPPER = (9, 0)
_MOST_ERROR = 0.05  # relative RMS of FlashAttention 3 against the emulation, normal operands: it measures 0.03


def prepare_low_attention(run: Runtime, model_runner: Any, device: torch.device) -> None:
    """Where the recipe asks for it: finds the layers, and sets scratch aside before the KV cache is sized.  A decode
    server of a pair has no prefill."""
    recipe = run.recipe
    if recipe.attention == "bf16" or (run.pair is not None and run.pair.mode == pairs.DECODE):
        return
    args = dialect().resolved(model_runner.server_args)
    kernel, reason = _kernel(recipe.kernel, args, device)
    if run.schedule.local:
        reason = "with DP attention passes have rows of other ranks"
    low = LowAttention(kernel, sample_tokens(recipe.attention_from), recipe.attention_from, verify=recipe.verify)
    heads = heads_of(model_runner.model)
    find_layers(model_runner.model, heads, low)
    run.low_attention = low
    most = model_runner.model_config.context_len
    if not reason and kernel == NATIVE and heads is not None:
        most = min(most, args.max_total_tokens or most, FP8_BYTES // (2 * heads.keys * heads.size))
        reason = _prepare_native(run, low, heads, most, batches.most_prefill_rows(model_runner), device)
    if reason:
        _leave(run, reason)
        return
    for why, names in low.stays_bf16.items():
        logger.info("mixquant: attention stays BF16 (%s): %s", why, some(names))
    if not low.layers:
        logger.warning("mixquant: attention stays BF16: no layer of this model can take fp8")
        return
    limits = run.schedule.low_attention = LowLimits(recipe.attention_from, most)
    run.schedule.label(run.layers)
    low.count = lambda rows: run.counters.add_low_attention(rows)
    low.emptied = partial(_in_bf16, run)
    logger.info(
        "mixquant: attention of %d layers runs in fp8 (%s) for requests of %d to %d tokens, of which %d or more are new"
        "; scratch %.0f MiB",
        len(low.layers),
        "FlashAttention 3" if kernel == NATIVE else "emulated: for measuring quality, it is slow",
        limits.tokens,
        limits.most,
        limits.rows,
        (low.scratch.nbytes if low.scratch else 0) / 2**20,
    )


def install_low_attention(run: Runtime, backend: Any) -> None:
    """Each time that the model's attention back end was built, after ``install_gathering``."""
    low = run.low_attention
    if low is None or run.schedule.low_attention is None:
        return
    kernels = Kernels(*flash_attention_3()) if low.scratch is not None else None
    reason = lower_attention(backend, low, kernels)
    if reason:
        _leave(run, reason)


def _leave(run: Runtime, reason: str) -> None:
    assert run.low_attention is not None
    run.low_attention.scratch = None
    _in_bf16(run)
    run.low_attention.leave([*run.low_attention.layers], reason)


def _in_bf16(run: Runtime) -> None:
    """No layer runs it in low precision: passes are scheduled, and roles are labelled, by that."""
    run.schedule.low_attention = None
    run.schedule.label(run.layers)


def _kernel(asked: str, args: Any, device: torch.device) -> tuple[str, str]:
    """``native`` or ``emulated``, and why neither can be."""
    name = prefill_attention(args)
    if not caches_bf16(args):
        return NATIVE, f"keys and values are cached in {args.kv_cache_dtype}"
    if name == "torch_native":
        return EMULATED, "kernel: native, and with torch_native it is emulated" if asked == NATIVE else ""
    if name != "fa3" or device.type != "cuda":
        return NATIVE, f"the attention back end is {name}: fp8 needs fa3, or torch_native, where it is emulated"
    if asked == EMULATED:
        return NATIVE, "kernel: emulated, and only torch_native emulates it"
    if torch.cuda.get_device_capability(device) != _HOPPER:
        return NATIVE, "FlashAttention 3 has fp8 on SM90 alone"
    return NATIVE, ""


def _prepare_native(run: Runtime, low: LowAttention, heads: Heads, tokens: int, rows: int, device: torch.device) -> str:
    if heads.size & (heads.size - 1) or not 64 <= heads.size <= 256:
        return f"heads are of {heads.size} elements"
    if tokens < run.recipe.attention_from:
        return f"requests have at most {tokens} tokens"
    shared = None
    if run.gathering is not None and run.gathering.heads == heads and tokens <= 2 * len(run.gathering.keys):
        shared = run.gathering.keys, run.gathering.values  # a layer of a pass gathers, or is low
    try:
        low.scratch = LowScratch.of(heads, tokens, rows, device, shared=shared)
        return _compare(low.scratch, low.sample, device)
    except torch.OutOfMemoryError:
        return "too little memory for its scratch"


def _compare(scratch: LowScratch, sample: int, device: torch.device) -> str:
    """Compiles what runs, and compares it with the emulation: one to four segments of a few hundred keys."""
    heads, seed = scratch.heads, torch.Generator(device).manual_seed(0)
    whole = flash_attention_3()[1]
    new = min(192, len(scratch.queries))
    for count in range(1, 5):
        total = min(new * count, len(scratch.keys))

        def random(number: int, rows: int = total) -> torch.Tensor:
            return torch.randn(rows, number, heads.size, dtype=torch.bfloat16, device=device, generator=seed)

        q, keys, values = random(heads.queries, new), random(heads.keys), random(heads.keys)
        at = torch.randperm(total, generator=seed, device=device)
        out, scaling = torch.empty_like(q), heads.size**-0.5
        try:
            scratch.attend(whole, q, (keys, values), at.int(), out, scaling=scaling, sample=sample, segment=new)
        except RuntimeError as refused:
            return f"FlashAttention 3 refuses fp8: {str(refused).splitlines()[0]}"
        expected = attend_emulated(q, keys[at], values[at], scaling=scaling, tokens=sample, segment=new)
        error = float((out.float() - expected.float()).norm() / expected.float().norm())
        if not error < _MOST_ERROR:
            return f"FlashAttention 3 in fp8 is {100 * error:.0f}% off the emulation, {count} segments"
    return ""
