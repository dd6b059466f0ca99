"""The experts of one MoE layer out of a ready-made NVFP4 checkpoint (``nvfp4_checkpoint.py``), expert by expert.

A checkpoint has three linears for each expert; SGLang's ``FusedMoE`` has ``w13_weight`` [E, 2I, H], gate above up, and
``w2_weight`` [E, H, I] of the experts that a rank holds. Slices follow ``FusedMoE.weight_loader``: tensor parallel
takes rows of gate and up and columns of down, expert parallel takes experts. A shared expert that SGLang fuses is the
last one of each rank, and a module of its own beside the experts in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.recipe.modules import EXPERT_LEAVES
from mixquant_sglang.weights.nvfp4_checkpoint import NVFP4Checkpoint

# SGLang's flag that keeps the shared expert out of FusedMoE.
_NO_FUSION = "--disable-shared-experts-fusion"


@dataclass(frozen=True)
class ExpertShare:
    """What a rank holds of a MoE layer: the experts ``local`` (their numbers, in the order of the rank's weights) of
    ``experts`` routed ones, then ``shared`` fused shared ones; ``inner`` rows of gate and of up, of tensor parallel
    rank ``rank`` of ``ranks``; ``hidden`` columns. In SGLang's words: ``intermediate_size_per_partition``,
    ``moe_tp_rank``, ``moe_tp_size``, ``num_fused_shared_experts``."""

    experts: int
    local: tuple[int, ...]
    inner: int
    hidden: int
    rank: int = 0
    ranks: int = 1
    shared: int = 0


@dataclass
class ReadyMadeExperts:
    """``name`` is SGLang's of the layer, ``layer`` the checkpoint's; ``leaves``: what gate, up and down are called."""

    weights: NVFP4Checkpoint
    name: str
    layer: str
    leaves: tuple[str, str, str]
    share: ExpertShare | None = None
    _shared: str = ""  # the module of the fused shared expert

    def place(self, share: ExpertShare) -> None:
        """Fixes what the rank holds; refuses missing and additional experts, and tensors whose shape or dtype is not
        that of the layer."""
        weights = self.weights
        if share.inner % BLOCK and share.ranks > 1:
            raise MixQuantError(f"{self.name}: {share.inner} columns of down on a rank are not a multiple of {BLOCK}")
        if share.shared > 1:
            raise MixQuantError(f"{self.name}: {share.shared} fused shared experts; ready-made weights fit one at most")
        found = {expert for expert in range(share.experts) if self._missing(f"{self.layer}.{expert}") is None}
        if len(found) < share.experts:
            gone = min(set(range(share.experts)) - found)
            raise MixQuantError(f"{weights.folder}: {self._missing(f'{self.layer}.{gone}')} is missing")
        if f"{self.layer}.{share.experts}.{self.leaves[0]}" in weights.quantised:
            raise MixQuantError(
                f"{weights.folder}: {self.layer} has more experts than the {share.experts} of the BF16 checkpoint"
            )
        modules = [f"{self.layer}.{expert}" for expert in range(share.experts)]
        if share.shared:
            self._shared = self._shared_expert()
            modules.append(self._shared)
            weights.taken.update(f"{self._shared}.{leaf}" for leaf in EXPERT_LEAVES[0])
        inner = share.inner * share.ranks
        for expert in modules:
            gate, up, down = self._linears(expert)
            weights.check_shapes(gate, inner, share.hidden)
            weights.check_shapes(up, inner, share.hidden)
            weights.check_shapes(down, share.hidden, inner)
        self.share = share

    def load(
        self, expert: int, master_w13: torch.Tensor, master_w2: torch.Tensor, *, check: bool
    ) -> tuple[list[NVFP4Tensor], NVFP4Tensor]:
        """([gate, up], down) of the expert at place ``expert`` of the rank's weights, on the device of its masters
        ``master_w13`` bfloat16 [2I, H] and ``master_w2`` [H, I]; with ``check`` the values have to be near those."""
        share = self.share
        assert share is not None
        at = self._shared if expert >= len(share.local) else f"{self.layer}.{share.local[expert]}"
        mine, every = slice(share.rank * share.inner, (share.rank + 1) * share.inner), slice(None)
        gate, up, down = self._linears(at)
        wanted = (
            (gate, mine, every, master_w13[: share.inner]),
            (up, mine, every, master_w13[share.inner :]),
            (down, every, mine if share.ranks > 1 else every, master_w2),
        )
        pieces = []
        for module, rows, columns, master in wanted:
            piece = self.weights.read(module, rows, columns, master.device)
            if check:
                self.weights.check_near(module, piece, master)
            pieces.append(piece)
        return pieces[:2], pieces[2]

    def warn_updated(self) -> None:
        self.weights.warn_updated()

    def _linears(self, expert: str) -> tuple[str, str, str]:
        gate, up, down = self.leaves if expert != self._shared else EXPERT_LEAVES[0]
        return f"{expert}.{gate}", f"{expert}.{up}", f"{expert}.{down}"

    def _missing(self, expert: str) -> str | None:
        linears = self._linears(expert)
        return next((f"{m}.{self.weights.layout.codes}" for m in linears if m not in self.weights.quantised), None)

    def _shared_expert(self) -> str:
        """Refused where the checkpoint has it in another precision: SGLang has it in one weight with the others."""
        weights, parent = self.weights, self.layer.rpartition(".")[0]
        for name in (f"{parent}.shared_experts", f"{parent}.shared_expert"):
            linears = [f"{name}.{leaf}" for leaf in EXPERT_LEAVES[0]]
            if all(module in weights.quantised for module in linears):
                return name
            if any(f"{module}.weight" in weights.source.tensors or module in weights.quantised for module in linears):
                raise MixQuantError(
                    f"{weights.folder}: {name} is not NVFP4 as the experts of {self.layer} are, and SGLang fuses them; "
                    f"start with {_NO_FUSION}, or keep {self.name} in BF16 with a recipe rule"
                )
        raise MixQuantError(f"{weights.folder}: {parent}.shared_expert(s) is missing, which SGLang fuses with experts")
