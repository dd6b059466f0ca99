from __future__ import annotations

from dataclasses import replace

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels import Device, packed_linear, select

CPU = Device("this CPU", None)
A100, L40S, H200 = Device("A100", (8, 0)), Device("L40S", (8, 9)), Device("H200", (9, 0))
B200, RTX5090 = Device("B200", (10, 0)), Device("RTX 5090", (12, 0))


@pytest.mark.parametrize(
    ("device", "prefill", "kernel"),
    [
        (CPU, "nvfp4", "emulated"),
        (A100, "nvfp4", "emulated"),
        (L40S, "fp8", "native"),
        (H200, "fp8", "native"),
        (B200, "nvfp4", "native"),
        (RTX5090, "nvfp4", "native"),
    ],
)
def test_auto(device: Device, prefill: str, kernel: str) -> None:
    chosen = select(recipe.load("auto"), device)
    assert (chosen.prefill, chosen.decode, chosen.kernels) == (prefill, "bf16", {prefill: kernel})
    assert device.name in chosen.reason or device is CPU


def test_bf16_needs_no_kernel() -> None:
    assert select(recipe.load("bf16"), CPU).kernels == {}


def test_native_is_refused_where_the_gpu_cannot_and_emulated_is_kept_where_it_can() -> None:
    asked = replace(recipe.load("nvfp4"), kernel="native")
    with pytest.raises(MixQuantError, match=r"SM100 or newer, this is H200, SM90"):
        select(asked, H200)
    assert select(recipe.load("nvfp4-emulated"), B200).kernels == {"nvfp4": "emulated"}


def test_precisions_that_only_a_rule_names_get_a_kernel_too() -> None:
    rule = recipe.LayerRule(match="x", prefill="fp8", decode=None, where="here:1")
    chosen = select(replace(recipe.load("nvfp4"), layers=(rule,)), H200)
    assert chosen.kernels == {"fp8": "native", "nvfp4": "emulated"}


@pytest.mark.parametrize("precision", ["nvfp4", "fp8"])
@pytest.mark.parametrize("kernel", ["native", "emulated"])
def test_each_pair_has_a_class(precision: str, kernel: str) -> None:
    packed = packed_linear(precision, kernel)
    assert (packed.precision, packed.kernel) == (precision, kernel)
    assert packed.refusal(4096, 4096) is None
