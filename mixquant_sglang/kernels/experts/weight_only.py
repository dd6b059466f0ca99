"""Experts of BF16 activations that read the packed weights of another kernel: one copy for both.

    gate, up = s13[e] * (x[t] @ w13[e].T) (+ bias)
    out[t] = scaling * sum_j r[t, j] * s2[e] * (act(gate, up) @ w2[e].T)

with e = ids[t, j] and w exact in BF16.  Products are FP32 sums; rounded to BF16 are act(gate, up), each expert's
weighted result and the sum, as in the kernels of quantised activations.  Nothing but the weights is quantised.

On a GPU few rows go through ``triton/expert_warps.py``, or ``triton/expert_rows.py`` with a Triton that does not suit
it: both read the weights of the chosen experts once, as they are packed.  More rows are sorted by expert, for
``triton/grouped.py``: that widens FP8 in registers.  For NVFP4 it wants BF16 codes, which costs a scratch of 2 bytes
for each weight of the layer, so up to ``PIECES`` rows take the kernels of few rows, a piece at a time.

SGLang's Marlin for FP8 and FP4 experts wants layouts of its own, a second copy: ``docs/kernels.md``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.experts.base import Form, Masters, PackedExperts, ReadyExperts
from mixquant_sglang.kernels.experts.emulated import Emulated, EmulatedFP8Experts, EmulatedNVFP4Experts
from mixquant_sglang.kernels.experts.native_fp8 import FP8Weights
from mixquant_sglang.kernels.limits import FEW_ROWS, FEW_UNSORTED, PIECES
from mixquant_sglang.kernels.tuning.expert_tiles import EMULATED, FEW_EACH, Tiles


class WeightOnlyExperts(Emulated):
    def __init__(
        self,
        masters: Masters,
        form: Form,
        *,
        scales: str = "search",
        ready: ReadyExperts | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        self.adopt(self.packed(masters, form, scales=scales, ready=ready, environment=environment))

    @classmethod
    @abstractmethod
    def packed(cls, *args: Any, **kwargs: Any) -> PackedExperts:
        """The kernel that packs, made with the arguments of ``__init__``; it need not run here."""

    @classmethod
    def of(cls, base: PackedExperts) -> WeightOnlyExperts:
        """On the memory of ``base``; ``refresh`` of either is that of both."""
        made: WeightOnlyExperts = object.__new__(cls)
        made.adopt(base)
        return made

    def adopt(self, base: Any) -> None:
        self._base: Any = base
        self._form = base.form
        self._every = torch.arange(FEW_ROWS, device=base.tensors()[0].device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        tensors: tuple[torch.Tensor, ...] = self._base.tensors()
        return tensors

    def refresh(self, masters: Masters) -> None:
        self._base.refresh(masters)

    def replace(self, ready: ReadyExperts) -> None:
        self._base.replace(ready)

    @property
    def experts(self) -> int:
        return len(self.tensors()[0])

    def _operand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return x, None

    def _tiles(self, ids: torch.Tensor) -> Tiles:
        return FEW_EACH if ids.numel() <= FEW_EACH.rows * self.experts else EMULATED

    def place(
        self, out: torch.Tensor, index: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> None:
        from mixquant_sglang.kernels.triton.expert_rows import matrix_rows_
        from mixquant_sglang.kernels.triton.expert_warps import serves, warp_rows_

        run = warp_rows_ if serves() else matrix_rows_
        run(out, index, x, weights, ids, self._matrix(0), self._matrix(1), self._form)

    def _by_pieces(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for start in range(0, len(x), FEW_ROWS):
            rows = slice(start, start + FEW_ROWS)
            self.place(out[rows], self._every[: len(x[rows])], x[rows], weights[rows], ids[rows])
        return out

    @abstractmethod
    def _matrix(self, which: int) -> Any:
        """w13 (0) or w2 (1) for the kernels of few rows."""


class EmulatedW8A16Experts(WeightOnlyExperts):
    """With torch alone, on a GPU with the grouped products."""

    precision = "w8a16"
    kernel = "emulated"
    _base: FP8Weights

    @classmethod
    def packed(cls, *args: Any, **kwargs: Any) -> PackedExperts:
        return EmulatedFP8Experts(*args, **kwargs)

    def adopt(self, base: Any) -> None:
        if not isinstance(base, FP8Weights):
            raise TypeError(f"w8a16 reads FP8 experts, not those of {type(base).__name__}")
        super().adopt(base)

    def _weight(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        codes, scales, bias = self._base.weight(which)
        if codes.is_cuda and not self._widens(codes.device):
            codes = codes.to(torch.bfloat16)
        return codes, scales, bias

    @staticmethod
    def _widens(device: torch.device) -> bool:
        """Whether grouped products read FP8 as it is: Triton has no E4M3 before SM89."""
        return torch.cuda.get_device_capability(device) >= (8, 9)

    def _matrix(self, which: int) -> Any:
        from mixquant_sglang.kernels.triton.expert_matrix import Matrix

        codes, scales, bias = self._base.weight(which)
        return Matrix(codes.view(torch.uint8), bias, scales)


class NativeW8A16Experts(EmulatedW8A16Experts):
    """On CUDA by the kernels of few rows, up to ``FEW_ROWS`` of them, or ``FEW_UNSORTED``."""

    kernel = "native"
    places = True

    def _on_gpu(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        from mixquant_sglang.kernels.triton.expert_warps import serves

        few = len(x) <= (FEW_ROWS if serves() or not self._widens(x.device) else FEW_UNSORTED)
        return self._by_pieces(x, weights, ids) if few else super()._on_gpu(x, weights, ids)


class EmulatedW4A16Experts(WeightOnlyExperts):
    """With torch alone, on a GPU with ``triton/unpack.py`` and the grouped products."""

    precision = "w4a16"
    kernel = "emulated"
    _base: EmulatedNVFP4Experts

    @classmethod
    def packed(cls, *args: Any, **kwargs: Any) -> PackedExperts:
        return EmulatedNVFP4Experts(*args, **kwargs)

    def adopt(self, base: Any) -> None:
        if not isinstance(base, EmulatedNVFP4Experts):
            raise TypeError(f"w4a16 reads the experts of the emulated NVFP4 kernel, not those of {type(base).__name__}")
        super().adopt(base)

    def _weight(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self._base.weight(which)

    def _product(self, x: torch.Tensor, which: int, expert: int) -> torch.Tensor:
        *_, scales, bias = self._base.held(which)
        total = x.float() @ self._base.unscaled(which, expert).t() * scales[expert][None]
        return total if bias is None else total + bias[expert][None]

    def _matrix(self, which: int) -> Any:
        from mixquant_sglang.kernels.triton.expert_matrix import Matrix

        codes, block_scales, scales, bias = self._base.held(which)
        return Matrix(codes, bias, scales, block_scales.view(torch.uint8))


class NativeW4A16Experts(EmulatedW4A16Experts):
    """On CUDA by the kernels of few rows, up to ``PIECES`` of them."""

    kernel = "native"
    places = True

    def _on_gpu(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        few = len(x) <= PIECES
        return self._by_pieces(x, weights, ids) if few else super()._on_gpu(x, weights, ids)
