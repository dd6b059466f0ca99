"""FP8 experts on tensor cores (SM89 and newer): scales of rows and of output channels, as FP8 linears have.

SGLang's own ways to FP8 experts from a BF16 checkpoint: ``--quantization fp8`` takes one scale for the whole batch of
activations, so a token's result depends on its neighbours; ``w8a8_fp8`` has these numbers, with SiLU and quantisation
as passes of their own; DeepGEMM wants scales by blocks.  Times: ``docs/kernels.md``.
"""

from __future__ import annotations

import torch

from mixquant_sglang.formats import fp8
from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.experts.base import Form, Masters, PackedExperts, ReadyExperts, halves, require_finite
from mixquant_sglang.kernels.linear.base import copy_all
from mixquant_sglang.kernels.tuning.expert_tiles import Shape, Tiles, pick


class FP8Weights:
    """Codes float8_e4m3fn and float32 scales of w13 and w2, and biases: what both FP8 kernels hold."""

    def __init__(self, masters: Masters, form: Form, ready: ReadyExperts | None) -> None:
        if ready is not None:
            raise ValueError("ready-made weights are NVFP4; this is fp8")
        self.allocate(masters, form, "", masters.w13.device)
        self._fill(masters)

    def allocate(self, shapes: Masters, form: Form, scales: str, device: torch.device) -> None:
        self._form = form
        (experts, n, _), h = shapes.w13.shape, shapes.w2.shape[1]
        self._codes13 = torch.empty(shapes.w13.shape, dtype=torch.float8_e4m3fn, device=device)
        self._codes2 = torch.empty(shapes.w2.shape, dtype=torch.float8_e4m3fn, device=device)
        self._scales13 = torch.empty((experts, n), dtype=torch.float32, device=device)
        self._scales2 = torch.empty((experts, h), dtype=torch.float32, device=device)
        self._bias13 = None if shapes.bias13 is None else torch.empty_like(shapes.bias13, device=device)
        self._bias2 = None if shapes.bias2 is None else torch.empty_like(shapes.bias2, device=device)

    @property
    def form(self) -> Form:
        return self._form

    def weight(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [E, N, K], scales [E, N] and bias of w13 (0) or w2 (1)."""
        if which:
            return self._codes2, self._scales2, self._bias2
        return self._codes13, self._scales13, self._bias13

    def tensors(self) -> tuple[torch.Tensor, ...]:
        biases = (bias for bias in (self._bias13, self._bias2) if bias is not None)
        return (self._codes13, self._scales13, self._codes2, self._scales2, *biases)

    def refresh(self, masters: Masters) -> None:
        require_finite(masters)
        self._fill(masters)

    def put(self, which: int, expert: int, weight: torch.Tensor) -> None:
        made = fp8.quantize(weight if which else halves(weight[None], self._form)[0])
        codes, scales, _ = self.weight(which)
        copy_all((codes[expert], scales[expert]), (made.data, made.scales))

    def put_biases(self, bias13: torch.Tensor | None, bias2: torch.Tensor | None) -> None:
        if self._bias13 is not None and bias13 is not None:
            self._bias13.copy_(halves(bias13, self._form))
        if self._bias2 is not None and bias2 is not None:
            self._bias2.copy_(bias2)

    def _fill(self, masters: Masters) -> None:
        for e in range(len(masters.w13)):
            self.put(0, e, masters.w13[e])
            self.put(1, e, masters.w2[e])
        self.put_biases(masters.bias13, masters.bias2)


class NativeFP8Experts(FP8Weights, PackedExperts):
    precision = "fp8"
    kernel = "native"
    piecewise = True

    def __init__(
        self,
        masters: Masters,
        form: Form,
        *,
        scales: str = "search",
        ready: ReadyExperts | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        super().__init__(masters, form, ready)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, I, H."""
        experts, h, i = self._codes2.shape
        return experts, i, h

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if not len(x):
            return torch.empty_like(x)
        where: Shape = (*self.shape, ids.shape[1])
        return self.run_with(x, weights, ids, pick(where, len(x)))

    def run_with(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        """``run`` of at least one row with ``tiles``."""
        from mixquant_sglang.kernels.experts import grouped

        sorted_routes = grouped.routing(ids, tiles.rows, len(self._codes13))
        first = grouped.Weight(self._codes13, self._scales13, self._bias13)
        second = grouped.Weight(self._codes2, self._scales2, self._bias2)
        codes, scales = operands.quantize(x, "fp8").operand
        hidden = grouped.up(codes, scales, first, self._form, weights, sorted_routes, tiles)
        codes, scales = operands.quantize(hidden, "fp8").operand
        return grouped.down(codes, scales, second, self._form, weights, sorted_routes, tiles)
