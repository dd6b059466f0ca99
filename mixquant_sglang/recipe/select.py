"""Which kernel executes a precision on a device, and why.

| GPU | prefill of recipe ``auto`` | nvfp4 | fp8 |
|---|---|---|---|
| SM100 and newer | nvfp4 (attention, down_proj: fp8) | native (or emulated) | native |
| SM89, SM90 | fp8 | emulated | native |
| older NVIDIA, CPU | nvfp4 (attention, down_proj: fp8) | emulated | emulated |

w8a16 and w4a16 are native on SM80 and newer; w4a16 beside native nvfp4 is refused.

fp8 in attention's linears and down_proj is a rule of that recipe, not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.capabilities import NATIVE_FROM, is_native
from mixquant_sglang.recipe.schema import Recipe


@dataclass(frozen=True)
class Device:
    """``capability`` is CUDA's (major, minor), None without an NVIDIA GPU."""

    name: str
    capability: tuple[int, int] | None

    def __str__(self) -> str:
        return self.name if self.capability is None else f"{self.name}, SM{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Selection:
    """What a recipe comes to on a device: a precision per phase and the kernel of each low precision.

    ``by_rule``: phase -> precisions that rules ask for beside the phase's own.  ``capability``: the device's, where
    more than the kernels depends on it: native NVFP4 experts, which SM120 has not."""

    prefill: str
    decode: str
    kernels: Mapping[str, str]
    reason: str
    by_rule: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    capability: tuple[int, int] | None = None

    def describe(self) -> str:
        def column(phase: str, own: str) -> str:
            rules = self.by_rule.get(phase, ())
            names = [p + (f" ({self.kernels[p]})" if p in self.kernels else "") for p in (own, *rules)]
            return f"{phase} {', '.join(names)}{' by rule' if rules else ''}"

        return f"{column('prefill', self.prefill)}, {column('decode', self.decode)}"


def select(recipe: Recipe, device: Device) -> Selection:
    """Resolves ``auto``; raises ``MixQuantError`` where the device cannot do what the recipe asks."""
    prefill, reason = recipe.prefill, "the recipe says so"
    if prefill == "auto":
        prefill, reason = _auto(device)
    own = {"prefill": prefill, "decode": recipe.decode}
    asked = {
        "prefill": {rule.prefill for rule in recipe.layers if rule.prefill},
        "decode": {rule.decode for rule in recipe.layers if rule.decode},
    }
    by_rule = {phase: tuple(sorted(asked[phase] - {own[phase]})) for phase in own}
    precisions = {*own.values(), *by_rule["prefill"], *by_rule["decode"]} - {"bf16"}
    # nvfp4 first: where the device can do neither natively, the refusal names what needs the newer GPU.
    kernels = {p: _kernel(p, recipe, device) for p in sorted(precisions, reverse=True)}
    if "w4a16" in kernels and kernels.get("nvfp4") == "native":
        raise MixQuantError(
            f"{recipe.source}: w4a16 reads NVFP4 weights as the emulated kernel has them, not in the layout of the FP4 "
            f"GEMMs of {device}; use recipe fp8-compact, or 'kernel: emulated' for accuracy work"
        )
    capability = device.capability if kernels.get("nvfp4") == "native" else None
    return Selection(prefill, recipe.decode, kernels, reason, by_rule, capability)


def _auto(device: Device) -> tuple[str, str]:
    if device.capability is None:
        return "nvfp4", "there is no NVIDIA GPU, so NVFP4 is emulated"
    if is_native("nvfp4", device.capability):
        return "nvfp4", f"{device} has NVFP4 tensor cores"
    if is_native("fp8", device.capability):
        return "fp8", f"{device} has FP8 tensor cores but none for NVFP4"
    return "nvfp4", f"{device} has neither NVFP4 nor FP8 tensor cores, so NVFP4 is emulated"


def _kernel(precision: str, recipe: Recipe, device: Device) -> str:
    needed, can_native = NATIVE_FROM[precision], is_native(precision, device.capability)
    if recipe.kernel == "native" and not can_native:
        raise MixQuantError(
            f"{recipe.source} kernel: native {precision} needs an NVIDIA GPU of SM{needed[0]}{needed[1]} or newer, "
            f"this is {device}; use 'kernel: auto' or 'kernel: emulated'"
        )
    if recipe.kernel == "emulated" or not can_native:
        return "emulated"
    return "native"
