"""What a recipe is once it was read and checked: a precision for each phase and for each layer that a rule names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import yaml

from mixquant_sglang.recipe.capabilities import NATIVE_FROM

RECIPE_ENV = "MIXQUANT_RECIPE"
MIN_TOKENS_ENV = "MIXQUANT_MIN_TOKENS"  # goes before what a recipe says
DEFAULT = "auto"
REGEX = "re:"

PRECISIONS = ("bf16", *NATIVE_FROM)
PREFILL_PRECISIONS = ("auto", *PRECISIONS)
KERNELS = ("auto", "native", "emulated")
SCALES = ("absmax", "search")
ROUNDINGS = ("nearest", "any")
ATTENTION = ("bf16", "fp8")
ATTENTION_FROM = 8192
KEYS = ("version", "description", "prefill", "decode", "protect", "kernel", "verify", "weights", "layers")
PREFILL_KEYS = ("precision", "min_tokens", "fuse", "weights", "rounding", "attention", "attention_from")


@dataclass(frozen=True)
class LayerRule:
    """One entry of ``layers``; a phase that is None keeps the recipe's default for that phase. An ``optional`` one may
    match no layer of a model."""

    match: str
    prefill: str | None
    decode: str | None
    where: str  # "file:line"
    optional: bool = False

    def to_yaml(self) -> dict[str, object]:
        """As an entry of ``layers``."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        asked = {phase: value for phase, value in phases.items() if value is not None}
        return {"match": self.match, **asked, **({"optional": True} if self.optional else {})}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; ``name`` is what was asked for (a shipped name or a path), ``source`` the file it came from."""

    name: str
    source: str
    prefill: str
    min_tokens: int | None  # None: "auto", what is measured at start
    fuse: bool  # quantise activations inside the norms and activations before the linears
    decode: str
    protect_last_prompt_token: bool
    kernel: str
    scales: str
    layers: tuple[LayerRule, ...]
    description: str = ""
    protected_tail: int = 1  # how many tokens at the prompt's end protect_last_prompt_token keeps in BF16
    verify: bool = True  # compare the native NVFP4 kernel with the emulated one at load
    prefill_weights: str = ""  # the folder or hub name of an NVFP4 checkpoint; "" packs from the BF16 one
    prefill_weights_at: str = ""  # "file:line prefill.weights"
    prefill_rounding: str = "nearest"  # of ready-made codes; "any": GPTQ's too, which nothing tells from a fine-tune's
    attention: str = "bf16"  # the precision of prefill's attention itself, whatever its linears take
    min_tokens_by: str = ""  # the variable and the flag, where they say it and not the file
    attention_from: int = ATTENTION_FROM  # tokens of a request, with its prefix, from which on it takes that

    @property
    def bf16_throughout(self) -> bool:
        """Whether it asks no layer to run low, on whatever device."""
        rules = {precision for rule in self.layers for precision in (rule.prefill, rule.decode)}
        return {self.prefill, self.decode} | rules - {None} == {"bf16"}

    @property
    def bf16_decode(self) -> bool:
        """Whether it asks no layer to decode low, on whatever device."""
        return {self.decode, *(rule.decode for rule in self.layers)} - {None} == {"bf16"}

    def to_yaml(self) -> str:
        """A file that ``load`` reads as this recipe again, but for where it stands: name, source and lines."""
        min_tokens: int | str = self.min_tokens or "auto"
        prefill: dict[str, object] = {"precision": self.prefill, "min_tokens": min_tokens, "fuse": self.fuse}
        tail = {"last_prompt_tokens": self.protected_tail} if self.protect_last_prompt_token else {}
        if self.attention != "bf16":
            prefill |= {"attention": self.attention, "attention_from": self.attention_from}
        if self.prefill_weights:
            rounding = {} if self.prefill_rounding == "nearest" else {"rounding": self.prefill_rounding}
            prefill |= {"weights": self.prefill_weights, **rounding}
        made = {
            "version": 1,
            **({"description": self.description} if self.description else {}),
            "prefill": prefill,
            "decode": {"precision": self.decode},
            "protect": {"last_prompt_token": self.protect_last_prompt_token} | tail,
            "kernel": self.kernel,
            "verify": self.verify,
            "weights": {"scales": self.scales},
            **({"layers": [rule.to_yaml() for rule in self.layers]} if self.layers else {}),
        }
        return yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=1 << 20, allow_unicode=True)


def takes_ready_made(prefill: str, layers: Collection[LayerRule]) -> bool:
    """Whether some layer may prefill in NVFP4, of which ready-made weights are."""
    return prefill in ("auto", "nvfp4") or any(rule.prefill == "nvfp4" for rule in layers)
