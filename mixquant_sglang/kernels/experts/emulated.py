"""Experts in FP8 and NVFP4 on hardware without tensor cores for them: the numbers of the native kernels, no speed.

On CUDA the same grouped products run with BF16 operands, in which all codes are exact: FP8 weights are widened in
registers, NVFP4 ones before.  Elsewhere each expert is a pair of FP32 products over its rows, which is the reference.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F

from mixquant_sglang.formats import BLOCK, fp8
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels import operands
from mixquant_sglang.kernels.environment import NOTHING, Environment
from mixquant_sglang.kernels.experts.base import (
    Form,
    Masters,
    PackedExperts,
    Ready,
    ReadyExperts,
    halves,
    require_finite,
)
from mixquant_sglang.kernels.experts.native_fp8 import FP8Weights
from mixquant_sglang.kernels.linear.base import copy_all
from mixquant_sglang.kernels.packing import quantize_nvfp4
from mixquant_sglang.kernels.tuning.expert_tiles import EMULATED, Tiles


class Emulated(PackedExperts):
    kernel = "emulated"
    _form: Form

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if not len(x):
            return torch.empty_like(x)
        return self._on_gpu(x, weights, ids) if x.is_cuda else self._by_expert(x, weights, ids)

    def _on_gpu(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        from mixquant_sglang.kernels.experts import grouped

        tiles = self._tiles(ids)
        sorted_routes = grouped.routing(ids, tiles.rows, self.experts)
        codes, scales = self._operand(x)
        hidden = grouped.up(codes, scales, grouped.Weight(*self._weight(0)), self._form, weights, sorted_routes, tiles)
        codes, scales = self._operand(hidden)
        second = grouped.Weight(*self._weight(1))
        return grouped.down(codes, scales, second, self._form, weights, sorted_routes, tiles)

    def _tiles(self, ids: torch.Tensor) -> Tiles:
        return EMULATED

    def _by_expert(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        parts = torch.zeros((*ids.shape, x.shape[1]), dtype=torch.bfloat16, device=x.device)
        for expert in sorted({*ids.flatten().tolist()}):
            if expert < 0:
                continue
            token, place = (ids == expert).nonzero(as_tuple=True)
            weight = weights[token, place, None]
            gate_up = self._product(x[token], 0, expert)
            gate_up = gate_up * weight if self._form.weighted_input else gate_up
            out = self._product(activated(gate_up, self._form).to(torch.bfloat16), 1, expert)
            parts[token, place] = (out if self._form.weighted_input else out * weight).to(torch.bfloat16)
        for place in range(ids.shape[1]):
            total += parts[:, place].float()
        return (total * self._form.scaling).to(torch.bfloat16)

    def _product(self, x: torch.Tensor, which: int, expert: int) -> torch.Tensor:
        """BF16 [M, K] -> FP32 [M, N] by w13 (``which`` 0) or w2 of ``expert``, with its bias."""
        codes, scales = self._operand(x)
        weight, weight_scales, bias = (t[expert] if t is not None else None for t in self._weight(which))
        assert weight is not None and weight_scales is not None
        total = codes.float() @ weight.float().t() * weight_scales[None]
        total = total if scales is None else total * scales
        return total if bias is None else total + bias[None]

    @property
    @abstractmethod
    def experts(self) -> int:
        """How many."""

    @abstractmethod
    def _operand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """BF16 codes [M, K] and float32 scales [M, 1], None where the codes are the values."""

    @abstractmethod
    def _weight(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [E, N, K], scales [E, N] and bias of w13 (0) or w2 (1)."""


def activated(gate_up: torch.Tensor, form: Form) -> torch.Tensor:
    """FP32 [M, 2I] -> FP32 [M, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if form.activation == "silu":
        return F.silu(gate) * up
    if form.activation == "gelu":
        return F.gelu(gate) * up
    gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
    return gate * torch.sigmoid(form.alpha * gate) * (up + 1)


class EmulatedFP8Experts(FP8Weights, Emulated):
    precision = "fp8"
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
    def experts(self) -> int:
        return len(self._codes13)

    def _operand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        quantised = fp8.quantize_activations(x)
        return quantised.data.to(torch.bfloat16), quantised.scales[:, None]

    def _weight(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.weight(which)


class EmulatedNVFP4Experts(Emulated):
    """Block scales for each 16 numbers along K, and a tensor scale for each expert's w13 and w2, or for gate and up."""

    precision = "nvfp4"
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
        self.allocate(masters, form, scales, masters.w13.device)
        self._fill(masters, ready)

    def allocate(self, shapes: Masters, form: Form, scales: str, device: torch.device) -> None:
        self._form, self._scales = form, scales
        self._held = [_empty(shape.shape, device) for shape in (shapes.w13, shapes.w2)]
        self._biases = [
            None if b is None else torch.empty_like(b, device=device) for b in (shapes.bias13, shapes.bias2)
        ]

    @property
    def form(self) -> Form:
        return self._form

    def held(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of w13 (0) or w2 (1): codes uint8 [E, N, K/2], block scales [E, N, K/16], scales float32 [E, N], bias."""
        return *self._held[which], self._biases[which]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (*self._held[0], *self._held[1], *(bias for bias in self._biases if bias is not None))

    def refresh(self, masters: Masters) -> None:
        require_finite(masters)
        self._fill(masters, None)

    def replace(self, ready: ReadyExperts) -> None:
        for e in range(self.experts):
            self._place(e, ready(e))

    def put(self, which: int, expert: int, weight: torch.Tensor) -> None:
        rows = weight if which else halves(weight[None], self._form)[0]
        self._put(which, expert, [quantize_nvfp4(rows, scales=self._scales)])

    def put_biases(self, bias13: torch.Tensor | None, bias2: torch.Tensor | None) -> None:
        for held, bias in zip(self._biases, (bias13, bias2), strict=True):
            if held is not None and bias is not None:
                held.copy_(halves(bias, self._form) if held is self._biases[0] else bias)

    def _fill(self, masters: Masters, ready: ReadyExperts | None) -> None:
        for e in range(self.experts):
            if ready is not None:
                self._place(e, ready(e))
            else:
                self.put(0, e, masters.w13[e])
                self.put(1, e, masters.w2[e])
        self.put_biases(masters.bias13, masters.bias2)

    def _place(self, e: int, ready: Ready) -> None:
        self._put(0, e, ready.w13)
        self._put(1, e, [ready.w2])

    def _put(self, which: int, e: int, parts: list[NVFP4Tensor]) -> None:
        alphas = torch.cat([part.tensor_scale.reshape(1).expand(part.shape[0]) for part in parts])
        copy_all(
            tuple(tensor[e] for tensor in self._held[which]),
            (torch.cat([p.packed for p in parts]), torch.cat([p.block_scales for p in parts]), alphas),
        )

    @property
    def experts(self) -> int:
        return len(self._held[0][0])

    def _operand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return operands.quantize(x, "qdq").operand[0], None

    def _weight(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.weight(which)

    def weight(self, which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """BF16 codes [E, N, K], made for the call, scales [E, N] and bias of w13 (0) or w2 (1)."""
        packed, block_scales, alphas = self._held[which]
        flat = packed.flatten(0, 1), block_scales.flatten(0, 1)
        if packed.is_cuda:
            from mixquant_sglang.kernels.triton.unpack import unscaled

            codes = unscaled(*flat)
        else:
            codes = NVFP4Tensor(*flat, torch.ones(())).unscaled()
        return codes.view(*packed.shape[:2], -1), alphas, self._biases[which]

    def _product(self, x: torch.Tensor, which: int, expert: int) -> torch.Tensor:
        (codes, _), bias = self._operand(x), self._biases[which]
        total = codes.float() @ self.unscaled(which, expert).t() * self._held[which][2][expert][None]
        return total if bias is None else total + bias[expert][None]

    def unscaled(self, which: int, expert: int) -> torch.Tensor:
        """FP32 [N, K] of one expert, without the scales that ``held`` has third."""
        packed, block_scales, _ = (tensor[expert] for tensor in self._held[which])
        return NVFP4Tensor(packed, block_scales, torch.ones(())).unscaled(torch.float32)


def _empty(shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    e, n, k = shape
    return (
        torch.empty((e, n, k // 2), dtype=torch.uint8, device=device),
        torch.empty((e, n, k // BLOCK), dtype=torch.float8_e4m3fn, device=device),
        torch.empty((e, n), dtype=torch.float32, device=device),
    )
