"""What would end a start when SGLang asks for its linears: asked of checkpoints by their headers, with no model built.

Of quantised checkpoints and ready-made prefill weights, with the names of ``weights/decoder.py``; a note says where
that does not know the model.  Not asked: shares of ranks that cut a block of scales, norms and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.assignment import Assigned, Assignment
from mixquant_sglang.kernels.registry import refusal
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.recipe.modules import why_bf16
from mixquant_sglang.recipe.select import Selection
from mixquant_sglang.tools.plan.models import find_decoder
from mixquant_sglang.weights.mixers import Matrix
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.ready_made import ReadyMadeWeights


def ends(folder: Path, quantised: bool, recipe: Recipe, selection: Selection, ranks: tuple[int, int]) -> list[str]:
    """The lines that end a start of the checkpoint in ``folder`` at its layers; ``ranks``: ``--tp`` and ``--ep``.
    MixQuantError for a model whose layers are not known here, and for checkpoints that cannot be opened."""
    checkpoint = QuantisedCheckpoint.open(folder) if quantised else None
    ready = None
    if checkpoint is None and recipe.prefill_weights and "nvfp4" in selection.kernels:
        ready = ReadyMadeWeights.open(recipe.prefill_weights, recipe.prefill_weights_at)
    if checkpoint is None and ready is None:
        return []
    decoder = find_decoder(folder)
    decoder.check(*ranks)
    assignment = Assignment(recipe, selection, ready, checkpoint)
    lines = []
    for at, block in decoder.named():
        matrices = [each for each in block.matrices(decoder.hidden, ranks[0]) if not each.refusal]
        experts = [Matrix(block.experts.name, 0, 0)] if block.experts else []
        for matrix in (*matrices, *experts):
            name = f"{at}.{matrix.name}"
            try:
                _check(name, matrix, assignment.of(name, {}), selection)
            except MixQuantError as error:
                lines.append(str(error))
    return _first(lines)


def _check(name: str, matrix: Matrix, assigned: Assigned, selection: Selection) -> None:
    linear = assigned.quantised
    if linear is None or why_bf16(name):
        return
    for precision in {assigned.prefill, assigned.decode} - {"bf16"}:
        kernel = selection.kernels[precision]
        why = refusal(precision, kernel, matrix.n, matrix.k, capability=selection.capability, form=linear.form)
        if why:
            raise MixQuantError(linear.cannot_be_taken(why))


def _first(lines: Sequence[str]) -> list[str]:
    """A start ends with the first; the others are often of the same kind."""
    more = f" (and so for {len(lines) - 1} more)" if len(lines) > 1 else ""
    return [lines[0] + more] if lines else []
