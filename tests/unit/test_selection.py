from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.registry import KERNELS, find, packed_linear, refusal
from mixquant_sglang.recipe.capabilities import is_native
from mixquant_sglang.recipe.select import Device, select

CPU = Device("this CPU", None)
A100, L40S, H200 = Device("A100", (8, 0)), Device("L40S", (8, 9)), Device("H200", (9, 0))
B200, RTX5090 = Device("B200", (10, 0)), Device("RTX 5090", (12, 0))


@pytest.mark.parametrize(
    ("device", "kernels", "says"),
    [
        (CPU, {"nvfp4": "emulated", "fp8": "emulated"}, "nvfp4 (emulated), fp8 (emulated) by rule"),
        (A100, {"nvfp4": "emulated", "fp8": "emulated"}, "nvfp4 (emulated), fp8 (emulated) by rule"),
        (L40S, {"fp8": "native"}, "fp8 (native)"),
        (H200, {"fp8": "native"}, "fp8 (native)"),
        (B200, {"nvfp4": "native", "fp8": "native"}, "nvfp4 (native), fp8 (native) by rule"),
        (RTX5090, {"nvfp4": "native", "fp8": "native"}, "nvfp4 (native), fp8 (native) by rule"),
    ],
)
def test_auto(device: Device, kernels: dict[str, str], says: str) -> None:
    chosen = select(recipe.load("auto"), device)
    assert (chosen.prefill, chosen.decode, chosen.kernels) == (next(iter(kernels)), "bf16", kernels)
    assert chosen.describe() == f"prefill {says}, decode bf16"
    assert device.name in chosen.reason or device is CPU


def test_nvfp4_with_fp8_in_attention() -> None:
    chosen = select(recipe.load("nvfp4-fp8"), H200)
    assert chosen.kernels == {"nvfp4": "emulated", "fp8": "native"}
    assert chosen.describe() == "prefill nvfp4 (emulated), fp8 (native) by rule, decode bf16"


def test_bf16_needs_no_kernel() -> None:
    assert select(recipe.load("bf16"), CPU).kernels == {}


def test_native_is_refused_where_the_gpu_cannot_and_emulated_is_kept_where_it_can() -> None:
    asked = replace(recipe.load("nvfp4"), kernel="native")
    with pytest.raises(MixQuantError, match=r"SM100 or newer, this is H200, SM90"):
        select(asked, H200)
    assert select(recipe.load("nvfp4-emulated"), B200).kernels == {"nvfp4": "emulated"}
    for device in (H200, CPU):
        with pytest.raises(MixQuantError, match="native nvfp4 needs an NVIDIA GPU of SM100 or newer"):
            select(replace(recipe.load("nvfp4-fp8"), kernel="native"), device)
    assert select(replace(recipe.load("auto"), kernel="native"), H200).kernels == {"fp8": "native"}


def test_precisions_that_only_a_rule_names_get_a_kernel_too() -> None:
    rule = recipe.LayerRule(match="x", prefill="fp8", decode=None, where="here:1")
    chosen = select(replace(recipe.load("nvfp4"), layers=(rule,)), H200)
    assert chosen.kernels == {"fp8": "native", "nvfp4": "emulated"}
    rules = (recipe.LayerRule("x", "bf16", "fp8", "here:1"), recipe.LayerRule("y", "nvfp4", "bf16", "here:2"))
    chosen = select(replace(recipe.load("nvfp4"), layers=rules), H200)
    assert chosen.describe() == "prefill nvfp4 (emulated), bf16 by rule, decode bf16, fp8 (native) by rule"


@pytest.mark.parametrize("precision", ["nvfp4", "fp8"])
@pytest.mark.parametrize("kernel", ["native", "emulated"])
def test_each_pair_has_a_class(precision: str, kernel: str) -> None:
    packed = packed_linear(precision, kernel)
    assert (packed.precision, packed.kernel) == (precision, kernel)
    assert refusal(precision, kernel, 4096, 4096) is None


def test_each_row_is_of_its_class() -> None:
    for row in KERNELS:
        packed = row.load()
        assert (packed.precision, packed.kernel) == (row.precision, row.kernel)
        assert find(row.precision, row.kernel, row.kind, row.form) is row  # no two rows for the same


def test_a_native_kernel_needs_what_selection_asks_for() -> None:
    for row in KERNELS:
        assert (row.capability is None) == (row.kernel == "emulated")
        if row.capability is not None:
            assert is_native(row.precision, row.capability)
            major, minor = row.capability
            assert not is_native(row.precision, (major, minor - 1) if minor else (major - 1, 9))


def test_there_is_no_kernel_for_a_precision_without_a_row() -> None:
    with pytest.raises(LookupError, match="no native kernel for linear in int8"):
        packed_linear("int8", "native")


def test_refusals_are_asked_without_torch() -> None:
    asked = "import sys; from mixquant_sglang.kernels import registry; registry.refusal('fp8', 'native', 8, 8); "
    subprocess.run([sys.executable, "-c", asked + "assert 'torch' not in sys.modules"], check=True)
