"""The tiny model's optimizer: Muon for matrices inside the layers, Adam for the rest, on flat FP32 masters."""

from __future__ import annotations

import argparse
import itertools
import math

import torch
from torch import Tensor

from scripts.models.tiny_model import (
    Model,
    Shape,
    Weights,
    weight_shapes,
)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[B, rows, columns] to matrices of the same singular directions with singular values near 1 (Muon's quintic)."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * (a @ a)) @ x
    made: Tensor = (x.mT if tall else x).float()
    return made


class Trainer:
    """Flat FP32 masters and moments, flat weights and gradients of the training dtype, and the step that joins them."""

    def __init__(self, shape: Shape, weights: Weights, device: torch.device, args: argparse.Namespace) -> None:
        self.shape, self.args, self.step = shape, args, 0
        names = weight_shapes(shape)
        self.master = torch.cat([weights[name].float().flatten() for name in names]).to(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.flat = self.master.to(self.dtype)
        self.grad, self.m, self.v = (torch.zeros_like(t) for t in (self.flat, self.master, self.master))
        self.model = Model(shape, self._views(self.flat, leaves=True))
        self.muon: list[tuple[int, int, tuple[int, ...], list[int]]] = []  # from, to, [layers, rows, columns], pieces
        at = 0
        for kind, group in itertools.groupby(names.items(), key=lambda item: item[0].partition("layers.")[2][1:]):
            sizes = [size for _, size in group]
            end = at + sum(math.prod(size) for size in sizes)
            if len(sizes[0]) == 2 and "embed" not in kind and kind:
                pieces = [shape.q_size, shape.kv_size, shape.kv_size] if "qkv" in kind else [sizes[0][0]]
                pieces = [shape.intermediate_size] * 2 if "gate_up" in kind else pieces
                self.muon.append((at, end, (len(sizes), *sizes[0]), pieces))
            at = end
        self.adam_from = 0 if args.optimizer == "adamw" else max(end for _, end, _, _ in self.muon)

    def _views(self, flat: Tensor, leaves: bool = False) -> Weights:
        views, at = {}, 0
        for name, size in weight_shapes(self.shape).items():
            end = at + math.prod(size)
            views[name] = flat[at:end].view(size)
            if leaves:
                views[name] = views[name].detach().requires_grad_()
                views[name].grad = self.grad[at:end].view(size)
            at = end
        return views

    def bf16_weights(self) -> Weights:
        return {name: view.bfloat16() for name, view in self._views(self.master).items()}

    def update(self, rate: float) -> Tensor:
        """One step at `rate` (0 to 1) of the learning rates; the gradient's norm before clipping."""
        args, grad = self.args, self.grad.float()
        norm: Tensor = torch.linalg.vector_norm(grad)
        grad *= (1.0 / (norm + 1e-6)).clamp(max=1.0)
        if args.optimizer == "muon":
            for low, high, size, pieces in self.muon:
                self.m[low:high].lerp_(grad[low:high], 0.05)
                direction = grad[low:high].lerp(self.m[low:high], 0.95).view(size)  # Nesterov
                parts = [orthogonalised(part) * max(1, part.shape[1] / part.shape[2]) ** 0.5
                         for part in torch.split(direction, pieces, dim=1)]  # fmt: skip
                master = self.master[low:high]
                master.mul_(1 - rate * args.muon_rate * args.decay)
                master.sub_(torch.cat(parts, dim=1).flatten(), alpha=rate * args.muon_rate)
        rest = slice(self.adam_from, None)
        self.m[rest].lerp_(grad[rest], 0.1)
        self.v[rest].lerp_(grad[rest].square(), 0.05)
        first, second = 1 - 0.9 ** (self.step + 1), 1 - 0.95 ** (self.step + 1)
        direction = self.m[rest] / first / ((self.v[rest] / second).sqrt() + 1e-8)
        if args.optimizer == "adamw":
            matrices = self.master[: self.muon[-1][1]]
            matrices.mul_(1 - rate * args.adam_rate * args.decay)
        self.master[rest].sub_(direction, alpha=rate * args.adam_rate)
        self.flat.copy_(self.master)
        self.grad.zero_()
        self.step += 1
        return norm
