"""One linear of SGLang out of a ready-made NVFP4 checkpoint (``nvfp4_checkpoint.py``): which slices a rank holds.

Slices follow SGLang's own weight loaders (``layers/linear.py``): column parallel takes rows, row parallel takes inputs
(K/2 bytes, K/16 scales), and a key or value head that there are too few of is held by neighbouring ranks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.weights.nvfp4_checkpoint import NVFP4Checkpoint


@dataclass(frozen=True)
class Share:
    """What a rank holds of a linear: ``sizes`` output rows of each part, ``k`` of ``full_k`` inputs; of ``ranks`` ranks
    the one numbered ``rank``.  ``kv_replicas`` neighbours hold the same rows of every part but the first."""

    sizes: tuple[int, ...]
    k: int
    full_k: int
    rank: int = 0
    ranks: int = 1
    kv_replicas: int = 1

    def rows(self, part: int) -> tuple[int, int]:
        """(first row, all rows) of ``part`` in the whole linear."""
        if self.k != self.full_k:
            return 0, self.sizes[part]
        replicas = self.kv_replicas if part else 1
        return self.rank // replicas * self.sizes[part], self.sizes[part] * self.ranks // replicas


@dataclass
class ReadyMadeLinear:
    """One linear of SGLang: ``modules`` of the checkpoint that hold its parts in order, or a single one all of them."""

    weights: NVFP4Checkpoint
    name: str
    modules: tuple[str, ...]
    share: Share | None = None

    def place(self, share: Share) -> None:
        """Fixes the slices; refuses tensors whose shape or dtype is not that of the linear."""
        self.share = share
        full = [share.rows(part)[1] for part in range(len(share.sizes))]
        if len(self.modules) > 1 and len(full) != len(self.modules):
            raise MixQuantError(
                f"{self.weights.folder}: {self.name} has {len(full)} parts here, but {', '.join(self.modules)} there"
            )
        for module, n in zip(self.modules, full if len(self.modules) > 1 else [sum(full)], strict=True):
            self.weights.check_shapes(module, n, share.full_k)

    def load(self, master: torch.Tensor, *, check: bool) -> list[NVFP4Tensor]:
        """This rank's rows of ``master`` bfloat16 [N, K], in order, on its device, in as few pieces as their tensor
        scales allow; with ``check`` their values have to be near those of ``master``."""
        share = self.share
        assert share is not None
        columns = slice(share.rank * share.k, (share.rank + 1) * share.k) if share.k != share.full_k else slice(None)
        pieces: list[NVFP4Tensor] = []
        done = above = 0
        for part, n in enumerate(share.sizes):
            first, full = share.rows(part)
            module = self.modules[part if len(self.modules) > 1 else 0]
            start = first if len(self.modules) > 1 else above + first
            piece = self.weights.read(module, slice(start, start + n), columns, master.device)
            if check:
                self.weights.check_near(module, piece, master[done : done + n])
            pieces.append(piece)
            done, above = done + n, above + full
        return _joined(pieces)

    def warn_updated(self) -> None:
        self.weights.warn_updated()


def _joined(pieces: Sequence[NVFP4Tensor]) -> list[NVFP4Tensor]:
    """Neighbours of the same tensor scale in one; nothing is rounded."""
    joined: list[list[NVFP4Tensor]] = []
    for piece in pieces:
        if joined and bool(joined[-1][0].tensor_scale == piece.tensor_scale):
            joined[-1].append(piece)
        else:
            joined.append([piece])
    return [
        NVFP4Tensor(
            torch.cat([piece.packed for piece in group]),
            torch.cat([piece.block_scales.view(torch.uint8) for piece in group]).view(torch.float8_e4m3fn),
            group[0].tensor_scale,
        )
        for group in joined
    ]
