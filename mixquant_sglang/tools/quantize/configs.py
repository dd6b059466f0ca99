"""What ``config.json`` says of a quantised checkpoint, for engines that load it.

Kept modules are named one by one, and towers as a whole too, whose linears engines fuse and name in their own ways.
MoE layers need more names: SGLang (0.5.17 ``compressed_tensors.py`` 735, 0.5.23 883) and vLLM ask for ``gate_proj``,
``up_proj`` and ``down_proj`` of expert 0, whatever the family calls them, and compressed-tensors for every linear.
ModelOpt's list is of names with ``*``, which SGLang compares with the layer's own name and with each part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mixquant_sglang import __version__
from mixquant_sglang.formats import BLOCK
from mixquant_sglang.recipe import REGEX
from mixquant_sglang.recipe.modules import EXPERT_LEAVES, tower_of
from mixquant_sglang.tools.quantize.targets import Targets
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, MODELOPT, Layout

# Gemma-4's experts lie beside the MLP; SGLang has them below ``moe``.
_BESIDE = re.compile(r"(.*\blayers\.\d+)\.experts")


def quantization_config(targets: Targets, layout: Layout = COMPRESSED_TENSORS) -> dict[str, Any]:
    """As llm-compressor's scheme NVFP4, in the keys that each compressed-tensors since 0.10 reads; or as ModelOpt's."""
    # a tied lm_head is a Linear without a tensor of its own; embeddings are none
    kept = ["lm_head", *(name for name in targets.kept if not name.rpartition(".")[2].startswith("embed_"))]
    ignore = list(dict.fromkeys(entry for name in kept for entry in _entries(name, layout)))
    if layout is MODELOPT:
        numbers: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
        modelopt: dict[str, Any] = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
        return {
            "config_groups": {"group_0": modelopt},
            "ignore": ignore,
            "quant_algo": "NVFP4",
            "producer": {"name": "mixquant", "version": __version__},
            "quant_method": "modelopt",
        }
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": BLOCK,
        "symmetric": True,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
        "block_structure": None,
    }
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {**weights, "dynamic": "local"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def modelopt_file(config: dict[str, Any]) -> dict[str, Any]:
    """``hf_quant_config.json``, which engines read that do not know ModelOpt's part of config.json."""
    said = {"quant_algo": config["quant_algo"], "kv_cache_quant_algo": None, "group_size": BLOCK}
    return {"producer": config["producer"], "quantization": {**said, "exclude_modules": config["ignore"]}}


def _entries(name: str, layout: Layout) -> Iterator[str]:
    """What says in an ``ignore`` list that ``name`` is not quantised."""
    if tower := tower_of(name):
        yield tower if layout is MODELOPT else f"{REGEX}(.*\\.)?{tower}\\."
    if name.rpartition(".")[2] != "experts":
        yield name
        return
    for layer in (name, *([f"{beside[1]}.moe.experts"] if (beside := _BESIDE.fullmatch(name)) else ())):
        if layout is MODELOPT:
            yield f"{layer}*"
        else:
            yield from (f"{layer}.0.{leaf}" for leaf in EXPERT_LEAVES[0])
            yield f"{REGEX}{re.escape(layer)}\\."
