"""Requests reach no kernel that the warm-up has not compiled: Triton's own cache keys, counted without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from mixquant_sglang.formats.fp8_blocks import FP8Blocks  # noqa: E402
from mixquant_sglang.kernels.limits import MANY_ROWS, WIDE  # noqa: E402
from mixquant_sglang.kernels.linear.w4a16 import NativeW4A16  # noqa: E402
from mixquant_sglang.kernels.linear.w8a16 import NativeW8A16  # noqa: E402
from mixquant_sglang.kernels.linear.w8a16_blocks import NativeBlockW8A16  # noqa: E402
from mixquant_sglang.kernels.triton import (  # noqa: E402
    activations,
    attention,
    block_rows,
    few_rows,
    launch,
    packed_rows,
    unpack,
    warm_up,
)
from mixquant_sglang.layers.gathered_attention import Heads  # noqa: E402
from mixquant_sglang.layers.low_scratch import LowScratch  # noqa: E402

CPU = torch.device("cpu")


class Recorder:
    """Stands for a kernel, and keeps the key of what Triton would compile for each launch on SM90."""

    def __init__(self, kernel: Any, keys: set[str]) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self._name, self._keys = kernel.fn.__name__, keys
        self._binder = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            _, specialization, options = self._binder(*args, debug=False, **kwargs)
            self._keys.add(f"{self._name} {specialization} {sorted(options.items())}")

        return launch


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    found: set[str] = set()
    for module, names in (
        (few_rows, ["_linear_rows"]),
        (launch, ["quantize_rows", "quantize_pairs"]),
        (unpack, ["_unpack_weights"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    monkeypatch.setattr(few_rows, "_shared_memory", lambda device: 232448)
    return found


@pytest.fixture
def readers(keys: set[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    for name in ("_packed_rows", "_packed_warps"):
        monkeypatch.setattr(packed_rows, name, Recorder(getattr(packed_rows, name), keys))
    monkeypatch.setattr(packed_rows, "shared_memory", lambda device: 232448)
    return keys


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "k", "cut"), [(96, 64, 0), (192, 48, 64), (100, 16, 0), (6144, 128, 4096)])
def test_few_rows(keys: set[str], n: int, k: int, cut: int, with_bias: bool) -> None:
    weight, bias = bf16(n, k), bf16(n) if with_bias else None
    warm_up.few(weight, bias, cut)
    warmed = {*keys}
    for slots in range(1, MANY_ROWS + 1, 3):
        for tokens in (1, 16, 17):
            for given in {None, bias} if bias is None else (None, bias):  # ranks but the first give no bias
                for index in (
                    torch.full((slots,), -1),
                    torch.full((2, MANY_ROWS), -1)[0, :slots],
                    torch.full((2, MANY_ROWS), -1)[1, :slots],
                ):
                    rest = bf16(tokens, n - cut) if cut else None
                    few_rows.linear_rows_(bf16(tokens, cut or n), index, bf16(slots, k), weight, given, rest=rest)
    assert keys == warmed
    assert len(warmed) == 4 * (1 + with_bias)  # a set for each bucket of rows


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel", [NativeW8A16, NativeW4A16])
@pytest.mark.parametrize(
    ("n", "k", "cut"), [(192, 48, 64), (100, 16, 0), (100, 64, 64), (2048, 1024, 0), (6144, 64, 4096)]
)
def test_packed_rows(
    readers: set[str], kernel: type[NativeW8A16] | type[NativeW4A16], n: int, k: int, cut: int, with_bias: bool
) -> None:
    linear, bias = kernel(torch.ones(n, k).bfloat16()), bf16(n) if with_bias else None
    for columns in {0, cut}:
        warm_up.weight_only(linear, n, k, bias, columns, CPU)
    warmed = {*readers}
    assert warmed
    for m in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, WIDE):
        for given in {None, bias} if bias is None else (None, bias):
            linear.matmul(bf16(m, k), given)
            for index in (torch.full((m,), -1), torch.full((2, MANY_ROWS), -1)[1, :m]):
                for tokens in (1, 16, 17):
                    linear.place(bf16(tokens, n), index, bf16(m, k), given)
                    if cut:
                        linear.place(bf16(tokens, cut), index, bf16(m, k), given, bf16(tokens, n - cut))
    assert readers == warmed


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "k", "cut"), [(192, 128, 64), (100, 256, 0), (2048, 128, 0)])
def test_block_rows(keys: set[str], n: int, k: int, cut: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_rows, "_block_rows", Recorder(block_rows._block_rows, keys))
    weight = FP8Blocks(torch.zeros(n, k).to(torch.float8_e4m3fn), torch.ones(-(-n // 128), k // 128))
    linear, bias = NativeBlockW8A16(bf16(n, k), ready=[weight]), bf16(n) if with_bias else None
    for columns in {0, cut}:
        warm_up.weight_only(linear, n, k, bias, columns, CPU)
    warmed = {*keys}
    assert warmed
    for m in (1, 15, 16, 17, 64, 65, 300):
        for given in {None, bias} if bias is None else (None, bias):
            linear.matmul(bf16(m, k), given)
            if m <= MANY_ROWS:
                index = torch.full((m,), -1)
                linear.place(bf16(17, n), index, bf16(m, k), given)
                if cut:
                    linear.place(bf16(17, cut), index, bf16(m, k), given, bf16(17, n - cut))
    assert keys == warmed


@pytest.mark.parametrize("protects", [False, True])
@pytest.mark.parametrize("fmt", launch.FORMATS)
@pytest.mark.parametrize("source", ["rows", "norm", "zero_centred_norm", "silu", "gelu"])
@pytest.mark.parametrize("k", [16, 208, 4096])
def test_quantisers(keys: set[str], source: str, fmt: str, k: int, protects: bool) -> None:
    warm_up.quantise(source, k, fmt, CPU, protects=protects)
    warmed = {*keys}
    largest = torch.full((200,), -1, dtype=torch.int32)
    for tokens in (*range(1, 65), 100, 128, 200):
        x = bf16(tokens, 2 * k if source in ("silu", "gelu") else k)
        for slots in (None, largest[:tokens], largest[:tokens].clone()) if protects else (None,):
            for count in (1, 16):
                keeping = {} if slots is None else {"slots": slots, "kept": bf16(count, k)}
                if source == "rows":
                    activations.quantize(x, fmt, **keeping)
                elif source == "silu":
                    activations.silu_mul(x, fmt, **keeping)
                elif source == "gelu":
                    activations.gelu_mul(x, fmt, **keeping)
                else:
                    options: dict[str, Any] = {"zero_centred": source == "zero_centred_norm", **keeping}
                    for residual in (None, bf16(tokens, k)):
                        activations.rmsnorm(x, bf16(k), 1e-5, fmt, residual=residual, **options)
    assert keys == warmed
    assert len(warmed) == (1 + protects) * (1 + ("norm" in source))


def test_attention_compiles_nothing_for_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check at start runs (``host/low_attention.py``) is all that requests of any length will."""
    found: set[str] = set()
    for name in ("_sample", "_quantize_cache", "_quantize_queries", "_merge"):
        monkeypatch.setattr(attention, name, Recorder(getattr(attention, name), found))

    def whole(q: torch.Tensor, *_: Any, out: torch.Tensor, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return out, torch.zeros(q.shape[1], len(q))

    scratch = LowScratch.of(Heads(4, 2, 64), 4000, 300, CPU)

    def run(new: int, total: int, segment: int, slots: torch.Tensor) -> None:
        cache = bf16(5000, 2, 64), bf16(5000, 2, 64)
        q = bf16(new, 4, 64)
        scratch.attend(whole, q, cache, slots[:total], torch.empty_like(q), scaling=0.1, sample=250, segment=segment)

    for count in range(1, 5):
        run(192, 192 * count, 192, torch.arange(5000).int())
    known = {*found}
    assert len(known) == 6  # merging of two, three and four parts, and the others
    for new, total, segment in ((1, 1, 300), (77, 333, 300), (300, 3999, 300), (751, 2222, 300), (33, 3001, 1000)):
        run(new, total, segment, torch.arange(5000).int())
    assert found == known


def test_every_kernel_is_warmed_or_only_runs_at_load() -> None:
    """gather and scatter run in captured graphs alone (rows.py), the scale search packs weights, and products make the
    launches of the other three, whose sizes are those of the weight.  Those of experts take constants that depend on
    the slots' bucket and on the tiles alone, all of which ``MixQuantExpertsMethod.warm_up`` runs."""
    assert {kernel.fn.__name__ for kernel in warm_up.KERNELS} == {
        *("_linear_rows", "_packed_rows", "_packed_warps", "_block_rows", "quantize_rows", "quantize_pairs"),
        *("_unpack_weights", "_scale", "_gather", "_scatter", "_search_scales", "_scaled_matmul"),
        *("grouped_matmul", "_up", "_down", "_list_units", "_expert_warps", "_combine"),
        *("_sample", "_quantize_cache", "_quantize_queries", "_merge"),
        "_norm_rope_write",
    }
    assert all(hasattr(kernel, "device_caches") for kernel in warm_up.KERNELS)
