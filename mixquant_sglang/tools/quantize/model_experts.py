"""The experts of a model of transformers: one module a layer, ``gate_up_proj`` and ``down_proj`` with a first dimension
of experts, called with rows, the experts that each row takes and their weights (``integrations/moe.py``).

Refused (MixQuantError): experts with biases, without a gate, with gate and up interleaved (gpt-oss), and those that
transformers runs in another way (Llama-4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.modules import block_of, is_draft, is_experts, is_outside


class ModelExperts:
    """Those of one layer. ``module``: transformers' own, whose forward takes (rows [T, H], experts [T, k], weights)."""

    def __init__(self, name: str, module: Any) -> None:
        known = ("gate_up_proj", "down_proj", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
        plain = all(hasattr(module, key) for key in known) and module.is_concatenated and not module.has_bias
        if not plain:
            raise MixQuantError(
                f"{name}: transformers runs the experts of {type(module).__name__} in a way that is not known here "
                "(biases, no gate, gate and up interleaved, or no routing of its own)"
            )
        self.name, self.module = name, module

    @property
    def count(self) -> int:
        return len(self.module.down_proj)

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 [2I, H], gate above up, and w2 [H, I] of one expert."""
        w13, w2 = self.module.gate_up_proj[expert].detach(), self.module.down_proj[expert].detach()
        return (w13.t().contiguous(), w2.t().contiguous()) if self.module.is_transposed else (w13, w2)

    def masters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All of them: [E, 2I, H] and [E, H, I]."""
        w13, w2 = self.module.gate_up_proj.detach(), self.module.down_proj.detach()
        return (w13.mT.contiguous(), w2.mT.contiguous()) if self.module.is_transposed else (w13, w2)

    def routed(self, x: torch.Tensor, experts: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Each expert that some row of ``x`` [T, H] takes, and the rows that take it; ``experts`` [T, k]."""
        for expert in torch.unique(experts).tolist():
            if 0 <= expert < self.count:
                yield expert, x[(experts == expert).any(dim=-1)]

    def between(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """What down of ``expert`` gets for the rows ``x`` [M, H]: [M, I]."""
        gate_up = F.linear(x, self.weights(expert)[0])
        hidden: torch.Tensor = self.module._apply_gate(gate_up)
        return hidden


def find(model: torch.nn.Module) -> dict[int, ModelExperts]:
    """By the number of the block, of the language model."""
    found: dict[int, ModelExperts] = {}
    for name, module in model.named_modules():
        block = block_of(name) if is_experts(name) and not is_outside(name) and not is_draft(name) else None
        if block is not None:
            found[block] = ModelExperts(name, module)
    return found
