"""Which class runs a precision: one row for each kernel, with what it needs and what it refuses.  No torch.

A new kernel is a class in a file of its own, a row here and a test.  The planner and the tools ask the same rows as the
server, so nobody has a list of refused shapes of his own.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixquant_sglang.kernels.limits import BLOCK, TILE
from mixquant_sglang.recipe.capabilities import NATIVE_FROM
from mixquant_sglang.recipe.roles import Kind

if TYPE_CHECKING:
    from mixquant_sglang.kernels.experts.base import PackedExperts
    from mixquant_sglang.kernels.linear.base import PackedLinear


@dataclass(frozen=True)
class Kernel:
    """``kernel``: "native" or "emulated".  ``capability``: the least (major, minor) of CUDA,
    None where it runs on any machine.  A weight [N, K] must have multiples of ``n`` and ``k``, and K > 0; ``refusal``
    is formatted with ``n`` and ``k`` of one that has not.  Of experts these are the sizes [I, H] of each: w13 is
    [2I, H], w2 [H, I].  ``path``: module and class.  ``below``: the least capability that it does not run on, and
    ``elsewhere`` what is said there.  ``form``: of the weights, "blocks" for a scale for each 128 x 128 of them."""

    precision: str
    kind: Kind
    kernel: str
    capability: tuple[int, int] | None
    n: int
    k: int
    refusal: str
    path: str
    below: tuple[int, int] | None = None
    elsewhere: str = ""
    form: str = ""

    def refuses(self, n: int, k: int, capability: tuple[int, int] | None = None) -> str | None:
        """Why no [n, k] weight can be packed on a GPU of ``capability``, or None if it can."""
        if self.below is not None and capability is not None and capability >= self.below:
            return self.elsewhere
        return self.refusal.format(n=n, k=k) if n % self.n or k % self.k or not k else None

    def load(self) -> Any:
        module, _, name = self.path.rpartition(".")
        return getattr(import_module(module), name)


_HERE = "mixquant_sglang.kernels.linear"
_EXPERTS = "mixquant_sglang.kernels.experts"
_BOTH = f"experts of [{{n}}, {{k}}] are not a multiple of {BLOCK} in both sizes"
_BLOCKS = f"K = {{k}} is not a multiple of {TILE}, for which its blocks have a scale"
KERNELS = (
    Kernel(
        *("nvfp4", Kind.LINEAR, "native", NATIVE_FROM["nvfp4"]),
        *(1, BLOCK, f"K = {{k}} is not a multiple of the block size {BLOCK}"),
        f"{_HERE}.native_nvfp4.NativeNVFP4",
    ),
    Kernel(
        *("nvfp4", Kind.LINEAR, "emulated", None),
        *(1, BLOCK, f"K = {{k}} is not a multiple of the block size {BLOCK}"),
        f"{_HERE}.emulated_nvfp4.EmulatedNVFP4",
    ),
    Kernel(  # CUTLASS wants rows of a multiple of 16 bytes
        *("fp8", Kind.LINEAR, "native", NATIVE_FROM["fp8"]),
        *(16, 16, "[{n}, {k}] is not a multiple of 16 in both sizes"),
        f"{_HERE}.native_fp8.NativeFP8",
    ),
    Kernel(  # few_rows.py, which computes the protected rows on a GPU, takes no other K; a CPU says the same
        *("fp8", Kind.LINEAR, "emulated", None),
        *(1, BLOCK, f"K = {{k}} is not a multiple of {BLOCK}"),
        f"{_HERE}.emulated_fp8.EmulatedFP8",
    ),
    Kernel(
        *("fp8", Kind.LINEAR, "native", NATIVE_FROM["fp8"]),
        *(1, TILE, _BLOCKS),
        f"{_HERE}.fp8_blocks.NativeBlockFP8",
        form="blocks",
    ),
    Kernel(
        *("fp8", Kind.LINEAR, "emulated", None),
        *(1, TILE, _BLOCKS),
        f"{_HERE}.fp8_blocks.EmulatedBlockFP8",
        form="blocks",
    ),
    Kernel(
        *("w8a16", Kind.LINEAR, "native", NATIVE_FROM["w8a16"]),
        *(1, BLOCK, f"K = {{k}} is not a multiple of {BLOCK}"),
        f"{_HERE}.w8a16.NativeW8A16",
    ),
    Kernel(
        *("w8a16", Kind.LINEAR, "emulated", None),
        *(1, BLOCK, f"K = {{k}} is not a multiple of {BLOCK}"),
        f"{_HERE}.w8a16.EmulatedW8A16",
    ),
    Kernel(
        *("w8a16", Kind.LINEAR, "native", NATIVE_FROM["w8a16"]),
        *(1, TILE, _BLOCKS),
        f"{_HERE}.w8a16_blocks.NativeBlockW8A16",
        form="blocks",
    ),
    Kernel(
        *("w8a16", Kind.LINEAR, "emulated", None),
        *(1, TILE, _BLOCKS),
        f"{_HERE}.w8a16_blocks.EmulatedBlockW8A16",
        form="blocks",
    ),
    Kernel(
        *("w4a16", Kind.LINEAR, "native", NATIVE_FROM["w4a16"]),
        *(1, BLOCK, f"K = {{k}} is not a multiple of the block size {BLOCK}"),
        f"{_HERE}.w4a16.NativeW4A16",
    ),
    Kernel(
        *("w4a16", Kind.LINEAR, "emulated", None),
        *(1, BLOCK, f"K = {{k}} is not a multiple of the block size {BLOCK}"),
        f"{_HERE}.w4a16.EmulatedW4A16",
    ),
    Kernel(
        *("fp8", Kind.EXPERTS, "native", NATIVE_FROM["fp8"]),
        *(BLOCK, BLOCK, _BOTH),
        f"{_EXPERTS}.native_fp8.NativeFP8Experts",
    ),
    Kernel(
        *("fp8", Kind.EXPERTS, "emulated", None),
        *(BLOCK, BLOCK, _BOTH),
        f"{_EXPERTS}.emulated.EmulatedFP8Experts",
    ),
    Kernel(  # as nobody knows the one scale that SM120's experts want of all activations: ``native_nvfp4.py``
        *("nvfp4", Kind.EXPERTS, "native", NATIVE_FROM["nvfp4"]),
        *(BLOCK, 128, f"experts of [{{n}}, {{k}}] are not a multiple of {BLOCK} and 128"),
        f"{_EXPERTS}.native_nvfp4.NativeNVFP4Experts",
        below=(11, 0),
        elsewhere="NVFP4 experts with a scale for each token run on SM100 and SM103 alone",
    ),
    Kernel(
        *("nvfp4", Kind.EXPERTS, "emulated", None),
        *(BLOCK, BLOCK, _BOTH),
        f"{_EXPERTS}.emulated.EmulatedNVFP4Experts",
    ),
    Kernel(
        *("w8a16", Kind.EXPERTS, "native", NATIVE_FROM["w8a16"]),
        *(BLOCK, BLOCK, _BOTH),
        f"{_EXPERTS}.weight_only.NativeW8A16Experts",
    ),
    Kernel(
        *("w8a16", Kind.EXPERTS, "emulated", None),
        *(BLOCK, BLOCK, _BOTH),
        f"{_EXPERTS}.weight_only.EmulatedW8A16Experts",
    ),
    Kernel(  # tensor cores take 16 of the even and of the odd numbers along K
        *("w4a16", Kind.EXPERTS, "native", NATIVE_FROM["w4a16"]),
        *(2 * BLOCK, 2 * BLOCK, f"experts of [{{n}}, {{k}}] are not a multiple of {2 * BLOCK} in both sizes"),
        f"{_EXPERTS}.weight_only.NativeW4A16Experts",
    ),
    Kernel(
        *("w4a16", Kind.EXPERTS, "emulated", None),
        *(BLOCK, BLOCK, _BOTH),
        f"{_EXPERTS}.weight_only.EmulatedW4A16Experts",
    ),
)


def find(precision: str, kernel: str, kind: Kind = Kind.LINEAR, form: str = "") -> Kernel:
    """The row; ``LookupError`` if there is none."""
    for row in KERNELS:
        if (row.precision, row.kernel, row.kind, row.form) == (precision, kernel, kind, form):
            return row
    raise LookupError(f"no {kernel} kernel for {kind.value} in {precision}" + (f" in {form}" if form else ""))


def refusal(
    precision: str,
    kernel: str,
    n: int,
    k: int,
    kind: Kind = Kind.LINEAR,
    capability: tuple[int, int] | None = None,
    form: str = "",
) -> str | None:
    """Why ``kernel`` packs no [n, k] weight in ``precision`` on a GPU of ``capability``, or None if it does."""
    try:
        return find(precision, kernel, kind, form).refuses(n, k, capability)
    except LookupError as error:
        return str(error)


def packed_linear(precision: str, kernel: str, form: str = "") -> type[PackedLinear]:
    """The class that packs weights in ``precision`` for ``kernel``."""
    found: type[PackedLinear] = find(precision, kernel, form=form).load()
    return found


def packed_experts(precision: str, kernel: str) -> type[PackedExperts]:
    """The class that packs experts."""
    found: type[PackedExperts] = find(precision, kernel, Kind.EXPERTS).load()
    return found
