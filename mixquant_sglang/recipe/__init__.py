"""What is asked of a server: which precision each kind of row and each layer gets.  No torch, no SGLang."""

from mixquant_sglang.recipe.parse import load, load_requested, requested, shipped, with_min_tokens
from mixquant_sglang.recipe.schema import (
    DEFAULT,
    KERNELS,
    KEYS,
    MIN_TOKENS_ENV,
    PRECISIONS,
    PREFILL_PRECISIONS,
    RECIPE_ENV,
    REGEX,
    ROUNDINGS,
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
    "MIN_TOKENS_ENV",
    "PRECISIONS",
    "PREFILL_PRECISIONS",
    "RECIPE_ENV",
    "REGEX",
    "ROUNDINGS",
    "SCALES",
    "LayerRule",
    "Recipe",
    "did_you_mean",
    "load",
    "load_requested",
    "nearest",
    "requested",
    "shipped",
    "show",
    "takes_ready_made",
    "with_min_tokens",
]
