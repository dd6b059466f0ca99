"""``min_tokens: auto``: passes that low precision does not pay for stay BF16, by what was timed on this GPU.

All ranks of a server come to one number: it follows from the sum of what each of them timed, or has on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mixquant_sglang import __version__
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.tuning import break_even
from mixquant_sglang.kernels.tuning.break_even import Totals
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.layers.pass_times import EXPERT_FIELDS, LINEAR_FIELDS, kinds_of
from mixquant_sglang.versions import batches, machine
from mixquant_sglang.versions.groups import rank_group

logger = logging.getLogger(__name__)


def reason_for_one(run: Runtime) -> str:
    """Why ``auto`` is 1, and nothing is timed, on a GPU; empty where it is."""
    selection = run.selection
    if "emulated" in selection.kernels.values():
        return "emulated kernels are for their numbers, at every length"
    if {selection.decode, *selection.by_rule.get("decode", ())} != {"bf16"}:
        return "shorter passes would be BF16, and the recipe decodes in low precision"
    return ""


def choose(
    run: Runtime,
    model_runner: object,
    linears: Sequence[MixQuantLinearMethod],
    experts: Sequence[MixQuantExpertsMethod],
    device: torch.device,
) -> None:
    """Sets the schedule's ``min_tokens`` where the recipe leaves it to us, before prefill graphs are captured; then a
    collective of all ranks."""
    if run.recipe.min_tokens is not None or not run.selection.kernels or device.type != "cuda":
        return
    why = "what is timed may come out otherwise" if run.environment.invariant else reason_for_one(run)
    if why:
        logger.info("mixquant: min_tokens: auto is 1: %s", why)
        return
    totals = _over_ranks(_time(run, model_runner, linears, experts, device))
    if totals is None:
        logger.warning("mixquant: min_tokens: auto is 1: passes could not be timed on every rank")
        return
    run.schedule.min_tokens = break_even.least_rows(totals)
    logger.info("mixquant: min_tokens: auto: %s", break_even.describe(totals, run.schedule.min_tokens))


def _time(
    run: Runtime,
    model_runner: object,
    linears: Sequence[MixQuantLinearMethod],
    experts: Sequence[MixQuantExpertsMethod],
    device: torch.device,
) -> Totals | None:
    most = batches.most_prefill_rows(model_runner)
    rows = [m for m in break_even.ROWS if m <= most] or [break_even.ROWS[0]]
    versions = {"mixquant": __version__, "sglang": machine.sglang_version(), **machine.kernel_versions()}
    protects = run.recipe.protect_last_prompt_token
    kinds = kinds_of(model_runner.model, linears, experts, protects=protects)  # type: ignore[attr-defined]
    parts: list[Totals] = []
    for (kind, precision), layers in sorted(kinds.items()):
        file = break_even.file_of(kind, precision, LINEAR_FIELDS if kind == "linear" else EXPERT_FIELDS)
        part = break_even.load_or_time(file, layers, rows, device, versions)
        if part is None:
            return None
        parts.append(part)
    return break_even.add_up(parts)


def _over_ranks(own: Totals | None) -> Totals | None:
    """The sum over all ranks, the same on each; None if one has none."""
    group = rank_group()
    found: list[Totals | None] = [own]
    if group is not None and dist.get_world_size(group) > 1:
        found = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, own, group=group)
    parts = [part for part in found if part is not None]
    return break_even.add_up(parts) if len(parts) == len(found) else None
