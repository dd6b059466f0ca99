"""Files that an interruption leaves whole or without their name, safetensors among them.

The shapes of a shard are known before its values are, so it is written tensor by tensor at its place: no more than one
tensor has to be in memory, where safetensors' own writer takes all of a file at once. safetensors is 8 bytes of header
length, a JSON header, and the tensors' bytes. A file gets its name when it is complete and on disk (``NAME.partial``,
fsync, rename).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang.weights.shard import item_bytes

PARTIAL = ".partial"

Bytes = bytes | bytearray | memoryview


def write_shard(
    path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], pieces: Iterable[tuple[str, Bytes]]
) -> None:
    """Writes safetensors: ``shapes`` name -> (dtype, shape), ``pieces`` the bytes of each tensor in order, the tensors
    in any order. The same arguments make the same bytes. Larger items come first, so that each tensor is aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: (-item_bytes(item[1][0]), item[0])):
        begin, end = end, end + item_bytes(dtype) * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    place = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, piece in pieces:
            file.seek(place[name])
            file.write(piece)
            place[name] += len(piece)
        for name, at in place.items():
            if at != 8 + len(text) + header[name]["data_offsets"][1]:
                raise RuntimeError(f"{path}: {name} was written incompletely")
        file.flush()
        os.fsync(file.fileno())
    _rename(partial, path)


def publish(path: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file that is either complete or does not have its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    _rename(partial, path)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Those of ``tensor``, row by row, on the CPU."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _rename(partial: Path, path: Path) -> None:
    """Also makes the new name survive a power cut."""
    partial.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
