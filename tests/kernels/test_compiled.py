"""A second launch of a kernel gives it what the first gave, and takes another compiled kernel where Triton would.

In a process of its own, with a driver that notes launches: no GPU is asked for anything."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver

launches = []


class Launcher:
    def __init__(self, src, metadata):
        self.name = metadata.name
        self.warps, self.stages = metadata.num_warps, metadata.num_stages

    def __call__(self, *arguments):
        launches.append((self, arguments))


class Utils:
    def load_binary(self, *_):
        return 1, 2, 32, 0, 1024

    looks = 0

    def get_device_properties(self, device):
        Utils.looks += 1
        return {"max_shared_mem": 232448}


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())
compiler.max_shared_mem = lambda device: 232448
from mixquant_sglang.kernels.triton import activations, few_rows, launch, packed_rows, packed_tiles

launch.sm = packed_rows.sm = lambda device: 90
packed_rows.shared_memory = lambda device: packed_tiles.shared_memory(torch.device("cuda", 0))  # tensors lie elsewhere


def bf16(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        if isinstance(one, torch.Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
        elif isinstance(one, compiler.LazyDict):
            assert one.data == other.data
        else:
            assert type(one) is type(other) and one == other, (one, other)


def twice(call, kernels):
    launches.clear()
    jit = kernels.pop()
    assert not jit.used
    call()
    assert jit.used == 1  # Triton chose
    call()
    assert jit.used == 1  # it was not asked
    (first, given), (second, again) = launches
    assert first is second
    same(given, again)
    jit.used = 0


class Asked:
    def __init__(self, module, name):
        self.function, self.used = getattr(module, name), 0
        setattr(module, name, self)

    def __getitem__(self, grid):
        self.used += 1
        return self.function[grid]


few, rows, pairs = (
    Asked(few_rows, "_linear_rows"), Asked(launch, "quantize_rows"), Asked(launch, "quantize_pairs")
)
index, kept = torch.full((5,), -1), bf16(5, 64)
for n, bias, cut in ((96, None, 0), (96, bf16(96), 0), (96, None, 64), (100, None, 0)):
    for slots in (5, 20, 40, 200):
        index, x, weight = torch.full((slots,), -1), bf16(slots, 64), bf16(n, 64)
        out, rest = bf16(30, cut or n), bf16(30, n - cut) if cut else None
        twice(lambda: few_rows.linear_rows_(out, index, x, weight, bias, rest), [few])
        few_rows.linear_rows_(bf16(7, cut or n), index[:-1], x[:-1], weight, bias, None if rest is None else rest[:7])
        assert (few.used == 0) == (slots - 1 > 16 or slots == 5), slots  # another bucket than 17 rows are in
        few.used = 0
slots = torch.full((30,), -1, dtype=torch.int32)
for fmt in ("fp8", "nvfp4", "qdq"):
    for keeping in ({}, {"slots": slots, "kept": bf16(5, 64)}):
        x, residual, weight = bf16(30, 64), bf16(30, 64), bf16(64)
        twice(lambda: activations.quantize(x, fmt, **keeping), [pairs if fmt == "nvfp4" else rows])
        twice(lambda: activations.silu_mul(bf16(30, 128), fmt, **keeping), [rows])
        twice(lambda: activations.rmsnorm(x, weight, 1e-6, fmt, **keeping), [rows])
        twice(lambda: activations.rmsnorm(x, weight, 1e-6, fmt, residual=residual, **keeping), [rows])
        twice(lambda: activations.rmsnorm(x, weight, 1e-6, fmt, zero_centred=True, **keeping), [rows])

# linears over packed weights, by either kernel; the driver, which is slow to say what a device is, is asked once
packed_tiles.STRAIGHT = True  # whatever Triton this is
tiled, warped = Asked(packed_rows, "_packed_rows"), Asked(packed_rows, "_packed_warps")
locks, few_looks = torch.zeros(packed_tiles.LOCKS, dtype=torch.int32), Utils.looks
for fp4, bias, cut, placed in ((False, None, 0, False), (False, bf16(96), 64, True), (True, None, 0, True)):
    weight = packed_rows.Packed(torch.zeros(96, 64).to(torch.float8_e4m3fn), torch.ones(96), locks)
    if fp4:
        scales = torch.zeros(96, 8).to(torch.float8_e4m3fn)
        weight = packed_rows.Packed(torch.zeros(96, 64, dtype=torch.uint8), torch.tensor(1.0), locks, scales)
    for m, kernel in ((5, warped), (12, tiled), (30, tiled)):
        x = bf16(m, weight.shape[1])
        keeping = {}
        if placed:
            keeping = {"out": bf16(30, cut or 96), "index": torch.full((m,), -1)}
            keeping["rest"] = bf16(30, 96 - cut) if cut else None
        twice(lambda: packed_rows.linear_rows(x, weight, bias, **keeping), [kernel])
        x = x[:-1]
        if placed:
            keeping["index"] = keeping["index"][:-1]
        packed_rows.linear_rows(x, weight, bias, **keeping)
        assert kernel.used == 0
assert Utils.looks == few_looks + 1

# another number of rows is of the same kind, an address between two multiples of 16 is not
launches.clear()
activations.quantize(bf16(1, 64), "fp8")
activations.quantize(bf16(30, 64), "fp8")
assert rows.used == 0 and launches[0][0] is launches[1][0]
shifted = bf16(30 * 64 + 1)[1:].view(30, 64)
activations.quantize(shifted, "fp8")
activations.quantize(shifted, "fp8")
assert rows.used == 2 and launches[2][0] is launches[3][0] is not launches[0][0]
assert [arguments[0] for _, arguments in launches] == [1, 30, 30, 30]  # the grid
"""


@pytest.mark.slow
def test_launches(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
