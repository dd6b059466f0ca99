"""What does not go with a recipe that keeps no BF16 weights: its decode reads packed weights in BF16 activations."""

from __future__ import annotations

import logging
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.refusal import Refusal, is_set, several
from mixquant_sglang.kernels.limits import PLACED
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY
from mixquant_sglang.versions import machine
from mixquant_sglang.versions.dialect import dialect

logger = logging.getLogger(__name__)

_OTHER = "use a recipe that decodes in bf16"
_AND = " and a recipe that keeps no BF16 weights"
_GATHERED = "MLPs see the rows of all ranks, whose protected ones this rank does not know, and would have to be BF16"
_LORA = "adapters beside weights that are not kept in BF16 have not been tested"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "enable_memory_saver",
        "--enable-memory-saver" + _AND,
        is_set,
        "the packed weights are the only ones, and would be lost with the memory that it releases",
        _OTHER,
    ),
    Refusal("enable_dp_attention", "--enable-dp-attention" + _AND, is_set, _GATHERED, _OTHER),
    Refusal("attn_dp_size", "--attn-dp-size > 1" + _AND, several, _GATHERED, _OTHER),
    Refusal("enable_lora", "--enable-lora" + _AND, is_set, _LORA, _OTHER),
    Refusal("lora_paths", "--lora-paths" + _AND, is_set, _LORA, _OTHER),
)


def precisions(recipe: Recipe) -> list[str]:
    """The precisions of weights alone that some layer decodes in."""
    asked = {recipe.decode, *(rule.decode for rule in recipe.layers if rule.decode)}
    return sorted(asked & WEIGHT_ONLY.keys())


def check(recipe: Recipe) -> None:
    """Raises ``MixQuantError`` for what such a recipe asks that nothing does."""
    if not precisions(recipe):
        return
    which = f"{recipe.source} decode: {' and '.join(precisions(recipe))}"
    if recipe.prefill_weights:
        raise MixQuantError(f"{which} packs the model's own weights; leave 'prefill: {{weights: ...}}' out")
    if machine.disaggregation():
        raise MixQuantError(f"{which} has not been tested in a prefill/decode pair; {_OTHER}")


def expect_slots(recipe: Recipe, model_runner: Any) -> None:
    """Says and sets how protected rows in captured passes are taken: with ``--enable-mixed-chunk`` decode rows ride on
    prefill passes, and fill slots of which few are used otherwise."""
    if not precisions(recipe) or torch.device(model_runner.device).type != "cuda":
        return
    from mixquant_sglang.kernels.triton import packed_rows, packed_tiles

    many = is_set(getattr(dialect().resolved(model_runner.server_args), "enable_mixed_chunk", None))
    packed_rows.expect_many_slots(many)
    if many and packed_tiles.STRAIGHT:  # with another Triton tiles take them anyway
        logger.info(
            "mixquant: --enable-mixed-chunk: protected rows of captured passes are taken %d slots at a time, used or "
            "not, for decode rows are among them; prompts that end alone in a pass wait longer than without",
            PLACED,
        )
