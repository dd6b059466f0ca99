"""What kernels need of the server that they run in, and cannot make themselves: this room never imports sglang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Environment:
    """Given to every kernel's constructor; most need none of it.

    ``fp4_linear_method`` makes SGLang's FP4 linear method, None where there is no native NVFP4.  ``own_quantizer``:
    activations of native NVFP4 are quantised by our kernels, fused where that is possible, or by FlashInfer's."""

    fp4_linear_method: Callable[[], Any] | None = None
    own_quantizer: bool = True


NOTHING = Environment()
