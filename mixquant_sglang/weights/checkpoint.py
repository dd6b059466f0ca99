"""The files of a checkpoint: read tensor by tensor, written so that an interruption leaves nothing that looks whole.

safetensors is 8 bytes of header length, a JSON header, and the tensors' bytes. The shapes of the result are known
before its values are, so a shard is written tensor by tensor at its place: no more than one tensor has to be in memory.
A file gets its name when it is complete and on disk (``NAME.partial``, fsync, rename); ``config.json``, without which
nothing loads a folder, comes last, and the note of what is finished goes after it.

A tensor that lies in a shard counts, also where a stale index leaves it out: engines load whole shards.

Refused (MixQuantError): a folder without ``config.json`` or safetensors, truncated or contradicting files, shards that
the index does not know, and going on with an unfinished folder that was begun from another source or with other
settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import show

INDEX = "model.safetensors.index.json"
PROGRESS = ".mixquant-progress.json"
COLUMNS = ".mixquant-columns"  # safetensors: what calibration found of each linear's columns, until the end as well
PARTIAL = ".partial"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Bytes = bytes | bytearray | memoryview

_CHUNK = 2**26
_NESTED = 64  # levels of a JSON file: fewer than what Python's own writer can do
_SMALL = 2**26  # a larger file beside the shards is no tokenizer, but weights in another format
_WEIGHTS = (".safetensors", "safetensors.index.json", ".bin", "bin.index.json", ".pt", ".pth", ".gguf", ".onnx", ".h5")


@dataclass(frozen=True)
class Stored:
    """A tensor of the source: its file, safetensors dtype and shape, and its bytes [begin, end) in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


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
        config, index = _json(folder / "config.json"), folder / INDEX
        sharded = index.is_file()
        listed = _json(index).get("weight_map") if sharded else {}
        if not isinstance(listed, dict) or not all(_is_shard(name) for name in listed.values()):
            raise MixQuantError(f"{index}: 'weight_map' has to map tensor names to safetensors files of this folder")
        shards = tuple(sorted(set(listed.values()))) if sharded else ("model.safetensors",)
        others = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in shards)
        if hidden := next((name for name in others if name.startswith("model")), None):
            what = f"is not in {INDEX}" if sharded else f"lies beside model.safetensors, without {INDEX}"
            raise MixQuantError(f"{folder / hidden}: {what}: the download is a mixture of two, or not complete")
        tensors: dict[str, Stored] = {}
        fingerprint: dict[str, list[Any]] = {"config.json": [hashlib.sha256(_dump(config)).hexdigest()]}
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
        """One tensor of a dtype in ``DTYPES``, on the CPU, in memory of its own."""
        stored = self.tensors[name]
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        (data,) = self._chunks(stored, stored.nbytes)
        return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of one tensor of any dtype, 64 MiB at a time."""
        return self._chunks(self.tensors[name], _CHUNK)

    def _chunks(self, stored: Stored, size: int) -> Iterator[bytearray]:
        with (self.folder / stored.shard).open("rb") as file:
            file.seek(stored.begin)
            for begin in range(stored.begin, stored.end, size):
                chunk = bytearray(min(size, stored.end - begin))
                if file.readinto(chunk) != len(chunk):
                    raise MixQuantError(f"{self.folder / stored.shard}: changed while it was read; start again")
                yield chunk

    def small_files(self) -> Iterator[Path]:
        """What goes along, relative to the folder: tokenizer, templates, code; nothing hidden, no weights."""
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in relative.parts)
            if hidden or not path.is_file() or relative == Path("config.json") or path.name.endswith(_WEIGHTS):
                continue
            if path.stat().st_size <= _SMALL:
                yield relative


@dataclass
class Progress:
    """What an unfinished ``out`` holds; kept in ``PROGRESS`` there until config.json is written."""

    out: Path
    settings: dict[str, Any]
    source: dict[str, list[Any]]
    finished: dict[str, int] = field(default_factory=dict)  # shard -> bytes
    input_amax: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, out: Path, settings: dict[str, Any], source: Source) -> Progress:
        """Begins in an empty folder, or goes on where the same run stopped."""
        note = cls(out, settings, source.fingerprint)
        if not (out / PROGRESS).exists():
            # an interruption before the first note leaves at most the note's temporary file
            if other := [path.name for path in out.iterdir() if path.name != PROGRESS + PARTIAL]:
                raise MixQuantError(
                    f"{out}: is not empty ({min(other)}) and holds no unfinished run; remove it, or name another OUT"
                )
            note.save()
            return note
        before = _json(out / PROGRESS)
        for what, now in (("settings", note.settings), ("source", note.source)):
            then = before.get(what) or {}
            if changed := sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key)):
                key = changed[0]
                detail = (
                    f"{key}: {then.get(key)!r} then, {now.get(key)!r} now" if what == "settings" else f"{key} changed"
                )
                raise MixQuantError(
                    f"{out}: holds an unfinished run with another {what} ({detail}); "
                    "repeat that run to finish it, or remove OUT to start again"
                )
        note.finished, note.input_amax = before["finished"], before["input_amax"]
        for shard, size in list(note.finished.items()):
            if not (out / shard).is_file() or (out / shard).stat().st_size != size:
                del note.finished[shard]
        return note

    def save(self) -> None:
        shown = {key: value for key, value in vars(self).items() if key != "out"}
        publish(self.out / PROGRESS, [_dump(shown)])

    def finish(self, shard: str) -> None:
        self.finished[shard] = (self.out / shard).stat().st_size
        self.save()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MixQuantError(f"{folder}: another run is writing there; wait for it, or name another OUT") from None
        yield
    finally:
        os.close(handle)


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
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def item_bytes(dtype: str) -> int:
    """Bytes of an element of a safetensors dtype: BF16, U8, F8_E4M3, I64, BOOL, ..."""
    bits = "8" if dtype == "BOOL" else dtype.partition("_")[0].lstrip("BFIUC")
    if bits not in ("8", "16", "32", "64"):
        raise MixQuantError(
            f"safetensors dtype {dtype}: its elements are not whole bytes, so this is no BF16 checkpoint"
        )
    return int(bits) // 8


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\0" not in name


def _header(path: Path) -> tuple[dict[str, Stored], list[Any]]:
    broken = f"{path}: is not a complete safetensors file; download it again"
    try:
        # It checks types, that the tensors fill the file without gap or overlap, and that each has the bytes of its
        # shape; it does not say where they lie.
        with safe_open(path, "pt") as known:
            names = {*known.keys()}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            stat, text = path.stat(), file.read(length)
    except FileNotFoundError:
        raise MixQuantError(f"{path}: no such file; MODEL needs model.safetensors, or {INDEX} and its shards") from None
    except SafetensorError as error:
        raise MixQuantError(f"{broken} ({_one_line(error)})") from None
    except OSError as error:
        raise MixQuantError(f"{path}: cannot be read: {error.strerror or error}") from None
    header = json.loads(text)
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    found = {
        name: Stored(path.name, entry["dtype"], tuple(entry["shape"]), *(8 + length + o for o in entry["data_offsets"]))
        for name, entry in entries
    }
    for name, stored in found.items():
        if stored.nbytes != item_bytes(stored.dtype) * math.prod(stored.shape):
            raise MixQuantError(f"{broken} ({show(name)} is misshapen)")
    if found.keys() != names:
        raise MixQuantError(f"{broken} (a tensor is named twice)")
    return found, [stat.st_size, stat.st_mtime_ns, hashlib.sha256(text).hexdigest()]


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(loaded, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except FileNotFoundError:
        raise MixQuantError(f"{path}: no such file; MODEL needs one") from None
    except OSError as error:
        raise MixQuantError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise MixQuantError(f"{path}: is not JSON: {_one_line(error)}") from None
    except RecursionError:
        raise MixQuantError(f"{path}: is nested too deeply") from None
    if not isinstance(loaded, dict):
        raise MixQuantError(f"{path}: has to be a JSON object")
    if _nested_deeper(loaded, _NESTED):
        raise MixQuantError(f"{path}: is nested too deeply; allowed: {_NESTED} levels")
    return loaded


def _nested_deeper(value: object, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_nested_deeper(item, levels - 1) for item in items)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."


def _dump(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _rename(partial: Path, path: Path) -> None:
    """Also makes the new name survive a power cut."""
    partial.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
