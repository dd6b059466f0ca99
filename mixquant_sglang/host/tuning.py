"""Which of the libraries' kernels, and which tiles of ours, serve this model on this GPU: measured or read at load."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from mixquant_sglang.errors import refusing
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.tuning import expert_cache, expert_tiles, fp4_experts, fp4_gemm, fp8_cache, fp8_gemm
from mixquant_sglang.kernels.tuning.fp8_gemm import Cell
from mixquant_sglang.layers.experts import MixQuantExpertsMethod
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.versions import batches, fp4, machine
from mixquant_sglang.versions.groups import over_ranks

logger = logging.getLogger(__name__)

Sizes = TypeVar("Sizes")


def tune_fp4(
    model_runner: Any, packed: Sequence[MixQuantLinearMethod], experts: Sequence[MixQuantExpertsMethod]
) -> None:
    methods = [m for m in packed if m.runs("nvfp4", "native")]
    measuring = fp4.fp4_gemm_measuring(model_runner) if methods else None
    if measuring is not None:
        most = batches.most_prefill_rows(model_runner)
        tuned = fp4_gemm.tune([m.copy_in("nvfp4") for m in methods], most, measuring)
        logger.info("mixquant: %s", tuned)
    shapes = {m.sizes: m.copy_in("nvfp4") for m in experts if m.runs("nvfp4", "native")}
    measuring = fp4.fp4_gemm_measuring(model_runner) if shapes else None
    if measuring is not None:
        logger.info("mixquant: %s", fp4_experts.tune(shapes, batches.most_prefill_rows(model_runner), measuring))


def tune_fp8(run: Runtime, model_runner: Any, packed: Sequence[MixQuantLinearMethod], device: torch.device) -> None:
    """Not for deterministic inference, where one product serves all numbers of rows.  A collective of all ranks."""
    if run.selection.kernels.get("fp8") != "native" or run.environment.invariant:
        return
    shapes = {shape for m in packed if m.runs("fp8", "native") for shape in m.gemm_shapes}
    cells: Mapping[tuple[int, int, int], Cell] = {}
    if shapes:
        with refusing():
            rows = [m for m in prefill_rows(model_runner) if m >= 256]
            cells = fp8_cache.load_or_tune(sorted(shapes), rows, device, machine.kernel_versions()).cells
    cells = _of_all_ranks(cells)
    if shapes:
        fp8_gemm.use(fp8_gemm.GemmTable(cells))


def tune_experts(
    run: Runtime, model_runner: Any, methods: Sequence[MixQuantExpertsMethod], device: torch.device
) -> None:
    """A collective of all ranks."""
    if run.selection.kernels.get("fp8") != "native":
        return
    shapes = {m.sizes: m.copy_in("fp8") for m in methods if m.runs("fp8", "native")}
    cells: Mapping[Any, Cell] = {}
    if shapes:
        rows = prefill_rows(model_runner)
        cells = expert_cache.load_or_tune(shapes, rows, device, machine.kernel_versions()).cells
    cells = _of_all_ranks(cells)
    if shapes:
        expert_tiles.use(expert_tiles.TileTable(cells))


def _of_all_ranks(cells: Mapping[Sizes, Cell]) -> dict[Sizes, Cell]:
    """``cells`` of this rank, as the first rank has them that has the same: ranks whose times differ, with no file that
    all read, would choose differently, and what each of them computes whole would not be the same on all."""
    found: dict[Sizes, Cell] = {}
    for others in reversed(over_ranks(dict(cells))):
        found |= others
    changed = sum(found[where].pick != cell.pick for where, cell in cells.items())
    if changed:
        logger.info("mixquant: %d of %d choices are those of a rank before this one", changed, len(cells))
    return {where: found[where] for where in cells}


def prefill_rows(model_runner: Any) -> list[int]:
    """Powers of two up to the rows of the longest prefill pass, at least 256: the sizes that kernels are timed for."""
    most = fp8_gemm.bucket(batches.most_prefill_rows(model_runner))
    return [2**e for e in range(4, max(most.bit_length(), 9))]
