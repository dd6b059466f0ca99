"""One safetensors file: what lies in it, as ``safetensors.safe_open`` says, and its bytes, by plain reads.

safe_open refuses headers whose types are wrong, whose tensors do not fill the file without gap or overlap, and that
give a tensor other bytes than its shape has. Where a tensor lies it does not say; by what it has checked, tensors
follow one another from the header's end on, in the order of ``offset_keys``.

Bytes are read and not mapped, as safe_open does it: a mapped file that is cut short, or whose disk or network fails,
ends the process by a signal (SIGBUS), where a read raises an error that becomes one line; and a file's mapped pages
count as memory of the process, where a read takes what it asks for and no more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.weights.json_file import one_line

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """A tensor: its file, safetensors dtype and shape, and where its bytes begin in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return item_bytes(self.dtype) * math.prod(self.shape)


def read_header(path: Path) -> tuple[dict[str, Stored], list[Any]]:
    """The tensors of ``path`` by name, in the order of their bytes, and what tells whether the file is still the same:
    its size, time of change and header's digest. FileNotFoundError if there is none, else MixQuantError."""
    try:
        with safe_open(path, "pt") as file:
            kinds = [(name, file.get_slice(name)) for name in file.offset_keys()]
            entries = [(name, kind.get_dtype(), tuple(kind.get_shape())) for name, kind in kinds]
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            stat, text = path.stat(), file.read(length)
    except FileNotFoundError:
        raise
    except SafetensorError as error:
        raise MixQuantError(
            f"{path}: is not a complete safetensors file; download it again ({one_line(error)})"
        ) from None
    except OSError as error:
        raise MixQuantError(f"{path}: cannot be read: {error.strerror or error}") from None
    found, at = {}, 8 + length
    for name, dtype, shape in entries:
        found[name] = Stored(path.name, dtype, shape, at)
        at += found[name].nbytes
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].nbytes, item[0])))
    return ordered, [stat.st_size, stat.st_mtime_ns, hashlib.sha256(text).hexdigest()]


def read_bytes(path: Path, stored: Stored, size: int) -> Iterator[bytearray]:
    """The bytes of ``stored``, ``size`` at a time, each time in memory of its own."""
    end = stored.begin + stored.nbytes
    with path.open("rb") as file:
        file.seek(stored.begin)
        for begin in range(stored.begin, end, size):
            chunk = bytearray(min(size, end - begin))
            if file.readinto(chunk) != len(chunk):
                raise MixQuantError(f"{path}: changed while it was read; start again")
            yield chunk


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a safetensors dtype: BF16, U8, F8_E4M3, I64, BOOL, ..."""
    bits = "8" if dtype == "BOOL" else dtype.partition("_")[0].lstrip("BFIUC")
    if bits not in ("8", "16", "32", "64"):
        raise MixQuantError(
            f"safetensors dtype {dtype}: its elements are not whole bytes, so this is no BF16 checkpoint"
        )
    return int(bits) // 8
