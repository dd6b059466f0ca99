"""A quantised checkpoint as the only copy of the weights: what of it is not used, and what is said of it."""

from __future__ import annotations

import logging

import torch

from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.text import some
from mixquant_sglang.versions.groups import over_stages
from mixquant_sglang.versions.loading import embeds
from mixquant_sglang.weights.quantised import QuantisedCheckpoint

logger = logging.getLogger(__name__)


def check_all_asked(run: Runtime) -> None:
    """Raises ``MixQuantError`` for what is quantised and no layer of the model, of whatever stage, has."""
    if (checkpoint := run.quantised) is not None:
        asked = {module for stage in over_stages([*checkpoint.takers, *checkpoint.kept]) for module in stage}
        checkpoint.check_all_asked(asked, run.known.blocks)


def check_all_there(run: Runtime, model: torch.nn.Module, matcher: RuleMatcher | None) -> None:
    """Raises ``MixQuantError`` for a parameter of ``model``, norms and tables among them, that the checkpoint lacks and
    something reads: a server of embeddings reads no lm_head, which some checkpoints leave out."""
    if (checkpoint := run.quantised) is not None and matcher is not None:
        parts = {}
        for name, _ in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if module.rpartition(".")[2] == "lm_head" and embeds():
                continue
            parts[name] = [f"{part}.{leaf}" for part in matcher.shards(module)]
        checkpoint.check_parameters(parts)


def tell(checkpoint: QuantisedCheckpoint | None) -> None:
    """Logs what came of it."""
    if checkpoint is None:
        return
    logger.info(
        "mixquant: weights are those of %s (%s), as they are; its scales of activations are not used",
        checkpoint.folder,
        checkpoint.family.words,
    )
    scales = checkpoint.scales_of_kv
    if scales or checkpoint.family.kv_cache:
        logger.info(
            "mixquant: the KV cache is BF16: not used is what %s says of it (%s)",
            checkpoint.folder,
            f"{scales[0]} and {len(scales) - 1} more" if scales else checkpoint.family.kv_cache,
        )
    for reason in sorted({*checkpoint.kept.values()}):
        names = sorted(name for name, why in checkpoint.kept.items() if why == reason)
        logger.info("mixquant: multiplied out to BF16 at load (%s): %s", reason, some(names))
