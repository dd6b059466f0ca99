"""Headers as safe_open says them, and bytes from where they lie."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.weights.shard import Stored, item_bytes, read_bytes, read_header

TENSORS = {
    "z.weight": torch.randn(3, 5).bfloat16(),
    "a.weight": torch.randn(7, 2),
    "empty": torch.empty(0, 4),
    "also empty": torch.empty(2, 0, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "scales": torch.rand(2, 3).to(torch.float8_e4m3fn),
    "exponents": torch.tensor([0, 127, 254], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "é": torch.arange(5, dtype=torch.int16).view(torch.uint16),
}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def write(path: Path, header: dict[str, Any], data: bytes, pad: int = 0) -> Path:
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_lie_where_their_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found, (size, _, _) = read_header(path)
    assert found.keys() == TENSORS.keys() and size == len(data)
    assert [stored.begin for stored in found.values()] == sorted(stored.begin for stored in found.values())
    for name, stored in found.items():
        begin, end = header[name]["data_offsets"]
        assert (stored.shard, stored.dtype, stored.shape) == (
            path.name,
            header[name]["dtype"],
            (*header[name]["shape"],),
        )
        assert (stored.begin, stored.nbytes) == (8 + length + begin, end - begin)
        for size in (1, 3, 2**20):
            assert b"".join(bytes(chunk) for chunk in read_bytes(path, stored, size)) == raw(TENSORS[name])


@pytest.mark.parametrize("pad", [0, 3, 40])
def test_the_order_of_the_bytes_need_not_be_that_of_the_header(tmp_path: Path, pad: int) -> None:
    header = {
        "last": {"dtype": "U8", "shape": [3], "data_offsets": [6, 9]},
        "__metadata__": {"made": "by hand"},
        "first": {"dtype": "I16", "shape": [2], "data_offsets": [0, 4]},
        "none": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
        "middle": {"dtype": "F16", "shape": [1], "data_offsets": [4, 6]},
    }
    path = write(tmp_path / "x.safetensors", header, bytes(range(9)), pad)
    found, _ = read_header(path)
    assert [*found] == ["first", "none", "middle", "last"]
    assert {name: b"".join(read_bytes(path, stored, 2)) for name, stored in found.items()} == {
        "first": bytes([0, 1, 2, 3]),
        "none": b"",
        "middle": bytes([4, 5]),
        "last": bytes([6, 7, 8]),
    }


def test_the_header_tells_files_apart(tmp_path: Path) -> None:
    one = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    prints = [
        read_header(write(tmp_path / "x.safetensors", header, bytes(4)))[1][2]
        for header in (one, one, {"a": one["a"] | {"dtype": "I8"}}, one | {"__metadata__": {"b": "c"}})
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_file_cut_short_while_it_is_read(tmp_path: Path) -> None:
    size = 2**20  # more than a file object reads ahead
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    chunks = read_bytes(path, read_header(path)[0]["a"], size // 4)
    next(chunks)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 2)
    with pytest.raises(MixQuantError, match=r"x\.safetensors: changed while it was read; start again"):
        list(chunks)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_elements_that_are_not_whole_bytes(tmp_path: Path, dtype: str) -> None:
    size = 8 * (4 if dtype == "F4" else 6) // 8
    header = {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}
    with pytest.raises(MixQuantError, match=f"safetensors dtype {dtype}: its elements are not whole bytes"):
        read_header(write(tmp_path / "x.safetensors", header, bytes(size)))


def test_bytes_of_a_shape() -> None:
    for dtype, tensor in (("BOOL", torch.bool), ("F8_E4M3", torch.float8_e4m3fn), ("U16", torch.uint16)):
        assert item_bytes(dtype) == tensor.itemsize
    for shape in ((), (3,), (2, 0), (4, 5)):
        assert Stored("x", "C64", shape, 0).nbytes == 8 * math.prod(shape)


def test_gaps_and_what_is_no_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}, bytes(5))
    with pytest.raises(MixQuantError, match=r"is not a complete safetensors file; download it again \(.*offset"):
        read_header(path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "y.safetensors")
    with pytest.raises(MixQuantError, match="cannot be read: "):
        read_header(tmp_path)
