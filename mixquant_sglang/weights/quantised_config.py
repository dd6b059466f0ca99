"""What a quantised checkpoint's config says it is: which of the formats that one packed copy can be made of.

| written by | says | weights |
|---|---|---|
| compressed-tensors | format nvfp4-pack-quantized | NVFP4 |
| ModelOpt | quant_algo NVFP4, W4A16_NVFP4 | NVFP4 |
| compressed-tensors | format float-quantized; strategy tensor, channel or block | FP8 |
| ModelOpt | quant_algo FP8, FP8_PER_CHANNEL_PER_TOKEN | FP8 |
| Qwen, DeepSeek | quant_method fp8, with or without weight_block_size | FP8 |

Refused (MixQuantError): all others, blocks that are not 128 x 128, weights that were transformed or are sparse.
No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK, TILE
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.recipe.capabilities import WEIGHT_ONLY, stored
from mixquant_sglang.recipe.modules import EXPERT_LEAVES, is_experts
from mixquant_sglang.recipe.schema import REGEX
from mixquant_sglang.weights.json_file import object_of, read_object, words_of
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, MODELOPT, Layout

FIELDS = ("quantization_config", "compression_config")
FILE = "hf_quant_config.json"
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_KNOWN = (
    f"known: compressed-tensors' nvfp4-pack-quantized and float-quantized, ModelOpt's {', '.join((*_NVFP4, *_FP8))}, "
    f"and fp8 with scales for tensors or blocks of {TILE} x {TILE}"
)
SCALES_OF_INPUTS = ("input_scale", "input_global_scale")
_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")
_IGNORED = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")
_PARTS = frozenset(
    {*("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"), *SCALES_OF_INPUTS}
)
_HEADS = re.compile(r"(?:model\.language_model|language_model\.model)\.")  # wrappers; the planner has ``model``


@dataclass(frozen=True)
class Family:
    """``precision``: fp8 or nvfp4; ``layout``: of NVFP4; ``blocks``: whether FP8 has scales for blocks; ``kv_cache``:
    what it says of a quantised KV cache, "" for nothing. ``ignored``, ``targets``: regular expressions for modules, of
    its lists; without targets it means all linears."""

    words: str
    precision: str
    layout: Layout | None = None
    blocks: bool = False
    kv_cache: str = ""
    ignored: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def leaves(self, name: str, shards: Sequence[str]) -> bool:
        """Whether its lists leave in BF16 the linear ``name``, which holds ``shards``, or the experts ``name``.  For
        the planner, that may have no more than a config; of a checkpoint the files say it."""
        if is_experts(name):
            return any(all(self._leaves(f"{name}.0.{leaf}") for leaf in each) for each in EXPERT_LEAVES)
        return self._leaves(name) or (bool(shards) and all(map(self._leaves, shards)))

    def _leaves(self, name: str) -> bool:
        among = any(re.match(target, name) for target in self.targets)
        return bool(self.targets and not among) or any(re.match(ignored, name) for ignored in self.ignored)

    @property
    def recipe(self) -> str:
        """The shipped one that takes it."""
        return f"{self.precision}-compact"


def said(
    config: Mapping[str, Any], folder: Path | None, file: str = "config.json"
) -> tuple[str, dict[str, Any]] | None:
    """(where, what) a config.json says of quantisation, or the file beside it in ``folder``; None for nothing, as which
    null and {} count.  MixQuantError, which names ``file`` or the one beside it, for what is no JSON object."""
    for inner in (config, config.get("text_config")):
        for field in FIELDS:
            if isinstance(inner, Mapping) and (found := object_of(file, inner, field)):
                return field, dict(found)
    if folder is not None and (folder / FILE).is_file():
        beside = object_of(str(folder / FILE), read_object(folder / FILE), "quantization")
        if not beside:
            raise MixQuantError(f"{folder / FILE}: says nothing under 'quantization', which it is there for")
        return FILE, {"quant_method": "modelopt", **beside}
    return None


def family(where: str, config: Mapping[str, Any]) -> Family:
    """MixQuantError, which begins with ``where``, for what no recipe takes and for shapes that it does not have."""
    exact = config.get("quant_method") == "compressed-tensors"
    lists = (words_of(where, config, key) for key in _IGNORED)
    ignored = tuple(_pattern(each, exact) for found in lists for each in found)
    groups = _groups(where, config) if exact else {}
    targets = [each for name, group in groups.items() for each in words_of(f"{where}: {name}", group, "targets")]
    every = any(each.isidentifier() and each[:1].isupper() for each in targets)  # a class: Linear
    return replace(
        _family(where, config),
        ignored=ignored,
        targets=() if every else tuple(_pattern(each, exact) for each in targets),
    )


def _groups(where: str, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    groups = object_of(where, config, "config_groups")
    return {name: object_of(f"{where}: config_groups", groups, name) for name in groups}


def _pattern(name: str, exact: bool) -> str:
    """A regular expression for what a list means by ``name``: compressed-tensors the last parts of a module's name,
    others a part of it or several, with ``*`` for anything, and what lies below."""
    if name.startswith(REGEX):
        return name.removeprefix(REGEX)
    name = _HEADS.sub("model.", name, count=1).strip(".")
    parts = [re.escape(name)] if exact else [re.escape(part) for part in name.split("*")]
    return r"(?:.*\.)?" + ".*".join(parts) + ("$" if exact else r"(?:$|\.)")


def _family(where: str, config: Mapping[str, Any]) -> Family:
    method = str(config.get("quant_method"))
    kv_cache = next((f"{key} {_short(config[key])}" for key in _KEYS if config.get(key)), "")
    if method == "compressed-tensors":
        return _compressed(where, config, kv_cache)
    if method.startswith("modelopt"):
        algorithm = config.get("quant_algo")
        if algorithm in _NVFP4:
            return Family(f"ModelOpt {algorithm}", "nvfp4", MODELOPT, kv_cache=kv_cache)
        if algorithm in _FP8:
            return Family(f"ModelOpt {algorithm}", "fp8", kv_cache=kv_cache)
        raise MixQuantError(f"{where}: quant_algo is {algorithm!r}; {_KNOWN}")
    if method == "fp8":
        blocks = config.get("weight_block_size")
        if blocks is None:
            return Family("fp8", "fp8", kv_cache=kv_cache)
        _check_blocks(where, "weight_block_size", blocks)
        return Family("fp8 in blocks", "fp8", blocks=True, kv_cache=kv_cache)
    raise MixQuantError(f"{where}: quant_method is {method!r}; {_KNOWN}")


def check_said(where: str, name: str, dtype: str) -> None:
    """MixQuantError if the tensor ``name`` is part of a quantised weight, of a checkpoint ``where`` no config says so;
    ``dtype``: as safetensors or torch calls it."""
    if name.rpartition(".")[2] in _PARTS or dtype.rpartition(".")[2] in ("F8_E4M3", "float8_e4m3fn"):
        raise MixQuantError(
            f"{where}: {name} ({dtype}) is part of a quantised weight, but neither quantization_config in config.json "
            f"nor {FILE} says in which format: take the checkpoint's own config files"
        )


def check_recipe(recipe: Recipe, found: Family, path: str) -> None:
    """Raises ``MixQuantError`` unless ``recipe`` takes the quantised checkpoint at ``path`` as it is."""
    if recipe.decode not in WEIGHT_ONLY or {stored(recipe.prefill), stored(recipe.decode)} != {found.precision}:
        raise MixQuantError(
            f"{path} is already quantised ({found.words}); recipe {recipe.name} derives its packed weights from a "
            f"plain BF16 checkpoint: give it the original one, or serve this one with recipe {found.recipe}"
        )


def _compressed(where: str, config: Mapping[str, Any], kv_cache: str) -> Family:
    form = config.get("format")
    wanted: dict[str, Any] = {"nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "group_size": BLOCK}}
    wanted["float-quantized"] = {"num_bits": 8, "type": "float"}
    if not isinstance(form, str) or form not in wanted:
        raise MixQuantError(f"{where}: format is {form!r}; {_KNOWN}")
    if config.get("transform_config"):
        raise MixQuantError(f"{where}: transform_config: its linears take inputs that nothing here transforms")
    sparsity = object_of(where, config, "sparsity_config")
    if sparsity.get("format") not in (None, "dense"):
        raise MixQuantError(f"{where}: sparsity_config: format is {sparsity['format']!r}; dense weights are known")
    strategies = set()
    for name, group in _groups(where, config).items():
        weights = object_of(f"{where}: {name}", group, "weights")
        for key, value in wanted[form].items():
            if weights.get(key) != value:
                raise MixQuantError(f"{where}: {name} has weights with {key} {weights.get(key)!r}, not {value!r}")
        if group.get("format") not in (None, form):
            raise MixQuantError(f"{where}: {name} has format {group['format']!r}, and others {form!r}; {_KNOWN}")
        if weights.get("symmetric") is False:
            raise MixQuantError(f"{where}: {name} has weights with zero points; {_KNOWN}")
        strategies.add(str(weights.get("strategy")))
        if weights.get("strategy") == "block":
            _check_blocks(where, "block_structure", weights.get("block_structure"))
    if form == "nvfp4-pack-quantized":
        return Family(f"compressed-tensors {form}", "nvfp4", COMPRESSED_TENSORS, kv_cache=kv_cache)
    if not strategies <= {"tensor", "channel", "block"} or ("block" in strategies and len(strategies) > 1):
        raise MixQuantError(f"{where}: weights have the strategies {sorted(strategies)}; {_KNOWN}")
    return Family(f"compressed-tensors {form}", "fp8", blocks="block" in strategies, kv_cache=kv_cache)


def _check_blocks(where: str, key: str, found: Any) -> None:
    if found not in ([TILE, TILE], (TILE, TILE)):
        raise MixQuantError(f"{where}: {key} is {found}; known: [{TILE}, {TILE}]")


def _short(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)[:60]
