"""In which convention an NVFP4 checkpoint is written, from its quantization config; all others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK
from mixquant_sglang.weights.json_file import object_of, read_object

if TYPE_CHECKING:
    from mixquant_sglang.weights.checkpoint import Source

_COMPRESSED = "nvfp4-pack-quantized"
_MODELOPT = ("NVFP4", "W4A16_NVFP4")  # the same weights
_ALLOWED = f"allowed: compressed-tensors' {_COMPRESSED} and ModelOpt's {' and '.join(_MODELOPT)}"


@dataclass(frozen=True)
class Layout:
    """The last parts of the tensors' names.  ``encodes``: tensor scales are stored as their reciprocals, [1]; else as
    they are, without a dimension.  ``input_scale``: that of activations.  ``known``: all that a quantised linear may
    have; biases and scales of activations and KV cache among them, which are not read."""

    name: str
    codes: str
    scales: str
    tensor_scale: str
    input_scale: str
    encodes: bool
    known: frozenset[str]

    @classmethod
    def of(cls, name: str, codes: str, tensor_scale: str, input_scale: str, *, encodes: bool) -> Layout:
        kv_cache = ("k_scale", "v_scale", "q_scale", "output_scale")
        known = frozenset((codes, "weight_scale", tensor_scale, input_scale, "bias", *kv_cache))
        return cls(name, codes, "weight_scale", tensor_scale, input_scale, encodes, known)


COMPRESSED_TENSORS = Layout.of(
    "compressed-tensors", "weight_packed", "weight_global_scale", "input_global_scale", encodes=True
)
MODELOPT = Layout.of("ModelOpt", "weight", "weight_scale_2", "input_scale", encodes=False)


def detect(source: Source) -> Layout:
    """MixQuantError if ``source`` is not NVFP4 in one of the two conventions."""
    file = source.folder / "config.json"
    found = object_of(str(file), source.config, "quantization_config")
    if not found and (source.folder / "hf_quant_config.json").is_file():
        file = source.folder / "hf_quant_config.json"
        found = {**object_of(str(file), read_object(file), "quantization"), "quant_method": "modelopt"}
    if not found:
        raise MixQuantError(f"{source.folder}: is not quantised (no quantization_config); {_ALLOWED}")
    method = str(found.get("quant_method"))
    if method == "compressed-tensors":
        _check_compressed(str(file), found)
        return COMPRESSED_TENSORS
    if method.startswith("modelopt"):
        algorithm = found.get("quant_algo")
        if algorithm not in _MODELOPT:
            raise MixQuantError(f"{file}: quant_algo is {algorithm!r}; {_ALLOWED}")
        return MODELOPT
    raise MixQuantError(f"{file}: quant_method is {method!r}; {_ALLOWED}")


def _check_compressed(file: str, config: Mapping[str, Any]) -> None:
    if config.get("format") != _COMPRESSED:
        raise MixQuantError(f"{file}: format is {config.get('format')!r}; {_ALLOWED}")
    if config.get("transform_config"):
        raise MixQuantError(f"{file}: transform_config: transformed weights do not fit the BF16 checkpoint")
    for name in (groups := object_of(file, config, "config_groups")):
        group = object_of(f"{file}: config_groups", groups, name)
        weights = object_of(f"{file}: {name}", group, "weights")
        wanted = {"num_bits": 4, "type": "float", "group_size": BLOCK}
        for key, value in wanted.items():
            if weights.get(key) != value:
                raise MixQuantError(f"{file}: {name} has weights with {key} {weights.get(key)!r}, not {value!r}")
        if group.get("format") not in (None, _COMPRESSED):
            raise MixQuantError(f"{file}: {name} has format {group['format']!r}; {_ALLOWED}")
