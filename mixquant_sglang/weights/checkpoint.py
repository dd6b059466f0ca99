"""A checkpoint in safetensors: its files by their headers, read tensor by tensor.

A tensor that lies in a shard counts, also where a stale index leaves it out: engines load whole shards.

Refused (MixQuantError): a folder without ``config.json`` or safetensors, truncated or contradicting files, and shards
that the index does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.weights.json_file import read_object
from mixquant_sglang.weights.shard import DTYPES, Stored, item_bytes, read_bytes, read_header

INDEX = "model.safetensors.index.json"

_CHUNK = 2**26
_READ = {**DTYPES, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
_SMALL = 2**26  # a larger file beside the shards is no tokenizer, but weights in another format
_WEIGHTS = (".safetensors", "safetensors.index.json", ".bin", "bin.index.json", ".pt", ".pth", ".gguf", ".onnx", ".h5")


@dataclass(frozen=True)
class Source:
    """A checkpoint by its headers: ``tensors`` by name, in the order of the shards and of their bytes.

    ``fingerprint``: size, time of change and header of each shard, and config.json; JSON, equal for the same source.
    ``others``: safetensors of the folder that are no part of it: no engine that follows the index reads them.
    """

    folder: Path
    shards: tuple[str, ...]
    sharded: bool
    config: dict[str, Any]
    tensors: dict[str, Stored]
    fingerprint: dict[str, list[Any]]
    others: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> Source:
        if not folder.is_dir():
            raise MixQuantError(f"{folder}: no such folder; MODEL is a local checkpoint ('hf download' fetches one)")
        config, index = read_object(folder / "config.json"), folder / INDEX
        sharded = index.is_file()
        listed = read_object(index).get("weight_map") if sharded else {}
        if not isinstance(listed, dict) or not all(_is_shard(name) for name in listed.values()):
            raise MixQuantError(f"{index}: 'weight_map' has to map tensor names to safetensors files of this folder")
        shards = tuple(sorted(set(listed.values()))) if sharded else ("model.safetensors",)
        others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in shards)
        if hidden := next((name for name in others if name.startswith("model")), None):
            what = f"is not in {INDEX}" if sharded else f"lies beside model.safetensors, without {INDEX}"
            raise MixQuantError(f"{folder / hidden}: {what}: the download is a mixture of two, or not complete")
        tensors: dict[str, Stored] = {}
        fingerprint: dict[str, list[Any]] = {"config.json": [_digest(config)]}
        for shard in shards:
            found, fingerprint[shard] = _header(folder / shard)
            if twice := tensors.keys() & found.keys():
                raise MixQuantError(f"{folder / shard}: {min(twice)} is in {tensors[min(twice)].shard} too")
            tensors |= found
        for name, shard in listed.items():
            if name not in tensors or tensors[name].shard != shard:
                raise MixQuantError(f"{index}: {name} is listed in {shard}, but is not there: the download is broken")
        return cls(folder, shards, sharded, config, tensors, fingerprint, tuple(others))

    def read(self, name: str) -> torch.Tensor:
        """One tensor of plain floating point, U8 or F8_E4M3, on the CPU, in memory of its own."""
        return self._read(self.tensors[name])

    def read_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """[count, K]: rows ``first`` to ``first + count`` of a tensor [..., K], all dimensions but the last taken as
        one; like ``read``, and no other bytes are read."""
        stored = self.tensors[name]
        begin = stored.begin + first * stored.shape[-1] * item_bytes(stored.dtype)
        return self._read(replace(stored, shape=(count, stored.shape[-1]), begin=begin))

    def _read(self, stored: Stored) -> torch.Tensor:
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=_READ[stored.dtype])
        (data,) = read_bytes(self.folder / stored.shard, stored, stored.nbytes)
        return torch.frombuffer(data, dtype=_READ[stored.dtype]).view(stored.shape)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of one tensor of any dtype, 64 MiB at a time."""
        stored = self.tensors[name]
        return read_bytes(self.folder / stored.shard, stored, _CHUNK)

    def small_files(self) -> Iterator[Path]:
        """What goes along, relative to the folder: tokenizer, templates, code; nothing hidden, no weights."""
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if hidden or not path.is_file() or relative == Path("config.json") or path.name.endswith(_WEIGHTS):
                continue
            if path.stat().st_size <= _SMALL:
                yield relative


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\0" not in name


def _header(path: Path) -> tuple[dict[str, Stored], list[Any]]:
    try:
        return read_header(path)
    except FileNotFoundError:
        raise MixQuantError(f"{path}: no such file; MODEL needs model.safetensors, or {INDEX} and its shards") from None


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, indent=1, sort_keys=True).encode()).hexdigest()
