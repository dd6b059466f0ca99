"""What kernels need of the server that they run in, and cannot make themselves: this room never imports sglang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class LinearExperts(NamedTuple):
    """NVFP4 experts as a checkpoint has them, up before gate.

    ``w13`` uint8 [E, 2I, H/2] with ``scales13`` float8_e4m3fn [E, 2I, H/16], ``w2`` [E, H, I/2] with ``scales2``
    [E, H, I/16]; ``gate``, ``up`` and ``down``: their tensor scales, float32 [E]."""

    w13: torch.Tensor
    scales13: torch.Tensor
    w2: torch.Tensor
    scales2: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class FP4Experts(Protocol):
    """SGLang's NVFP4 experts with a scale for each token."""

    def arrange(self, weights: LinearExperts) -> tuple[torch.Tensor, ...]:
        """The tensors that ``run`` wants, of the same shapes and dtypes for the same shapes."""
        ...

    def run(
        self,
        arranged: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        """As ``PackedExperts.run``, of at least one row; ``activation``: silu or gelu."""
        ...


@dataclass(frozen=True)
class Environment:
    """Given to every kernel's constructor; most need none of it.

    ``fp4_linear_method`` makes SGLang's FP4 linear method, None where there is no native NVFP4.  ``own_quantizer``:
    activations of native NVFP4 are quantised by our kernels, fused where that is possible, or by FlashInfer's.
    ``fp4_experts``: None where there are no native NVFP4 experts.  ``invariant``: the bits of a row must not depend on
    how many others there are (deterministic inference).  ``fp8_block_linear``: SGLang's linear of FP8 weights in blocks
    of 128 x 128, which quantises activations itself: (bfloat16 [M, K], codes, scales) -> bfloat16 [M, N]; None where no
    such weights are served natively."""

    fp4_linear_method: Callable[[], Any] | None = None
    own_quantizer: bool = True
    fp4_experts: FP4Experts | None = None
    invariant: bool = False
    fp8_block_linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


NOTHING = Environment()
