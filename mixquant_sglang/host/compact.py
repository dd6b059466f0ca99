"""What does not go with a recipe that keeps no BF16 weights: its decode reads packed weights in BF16 activations."""

from __future__ import annotations

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.refusal import Refusal, is_set, several
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY
from mixquant_sglang.versions import machine

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
