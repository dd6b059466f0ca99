"""What is asked of a server: which precision each kind of row and each layer gets.  No torch, no SGLang."""

from mixquant_sglang.recipe.parse import load, requested, shipped
from mixquant_sglang.recipe.schema import (
    DEFAULT,
    KERNELS,
    KEYS,
    PRECISIONS,
    PREFILL_PRECISIONS,
    RECIPE_ENV,
    REGEX,
    SCALES,
    LayerRule,
    Recipe,
    takes_ready_made,
)
from mixquant_sglang.recipe.text import did_you_mean, nearest, show

__all__ = [
    "DEFAULT",
    "KERNELS",
    "KEYS",
    "PRECISIONS",
    "PREFILL_PRECISIONS",
    "RECIPE_ENV",
    "REGEX",
    "SCALES",
    "LayerRule",
    "Recipe",
    "did_you_mean",
    "load",
    "nearest",
    "requested",
    "shipped",
    "show",
    "takes_ready_made",
]
