"""NVFP4 experts on tensor cores (SM100 and SM103): SGLang's own, of FlashInfer's TensorRT-LLM kernels.

Weights are quantised here, with the search, or ready-made; SGLang arranges and runs them (``Environment.fp4_experts``,
``versions/fp4_experts.py``).  Of its FP4 experts these alone have a scale for each token, so that no row depends on
another: x is quantised with it, gate and up give BF16, which is quantised again with a scale for each token and expert.

    out[t] = sum_j scaling * r[t, j] * w2[e_j](act(gate[e_j](x[t])) * up[e_j](x[t]))

The scale is max|row| / (448 * 6), where the emulated experts have the next power of two: the errors are alike
(``formats/nvfp4.py``), the numbers are not the same ones.  SGLang 0.5.17 rounds routing weights to BF16 for it.

I is padded to a multiple of 128, as the kernels' layout wants 128 rows: gate, up and the columns of w2 get zeros, which
give zeros.  SGLang pads w13 as a whole, after its second half, and so never may here.

Refused: sizes (``registry.py``), biases, activations other than SiLU and GELU, routing weights on the input, and other
GPUs.  SM120 has FP4 experts with one scale for all activations, set beforehand; from a BF16 checkpoint nobody knows
that scale, and what exceeds it is cut off, so experts stay BF16 there.
This kernel has not run on a Blackwell GPU: what is tested are the bytes, layouts, calls and refusals.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import BLOCK
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.environment import NOTHING, Environment, LinearExperts
from mixquant_sglang.kernels.experts.base import (
    Form,
    Masters,
    PackedExperts,
    Ready,
    ReadyExperts,
    halves,
    require_finite,
)
from mixquant_sglang.kernels.linear.base import copy_all
from mixquant_sglang.kernels.packing import quantize_nvfp4

ROWS = 128  # of which I must be a multiple in the kernels' layout


class NativeNVFP4Experts(PackedExperts):
    precision = "nvfp4"
    kernel = "native"

    def __init__(
        self,
        masters: Masters,
        form: Form,
        *,
        scales: str = "search",
        ready: ReadyExperts | None = None,
        environment: Environment = NOTHING,
    ) -> None:
        if environment.fp4_experts is None:
            raise MixQuantError("the native nvfp4 kernel needs SGLang's FP4 experts, which were not provided")
        self._sglang, self._form, self._scales = environment.fp4_experts, form, scales
        self._sizes = masters.w2.shape
        self._device = masters.w2.device
        self._held = self._arranged(ready or self._quantiser(masters))

    @classmethod
    def refuses(cls, form: Form, biased: bool) -> str | None:
        if form.activation not in ("silu", "gelu"):
            return f"SGLang's NVFP4 experts do not take activation {form.activation} here"
        if biased:
            return "SGLang's NVFP4 experts take no bias"
        if form.weighted_input:
            return "SGLang's NVFP4 experts do not weight their input"
        return None

    def run(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        if not len(x):
            return torch.empty_like(x)
        if self._form.scaling != 1:
            weights = weights * self._form.scaling
        return self._sglang.run(self._held, x, weights, ids, self._form.activation)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._held

    def refresh(self, masters: Masters) -> None:
        require_finite(masters)
        self.replace(self._quantiser(masters))

    def replace(self, ready: ReadyExperts) -> None:
        copy_all(self._held, self._arranged(ready))

    def _quantiser(self, masters: Masters) -> ReadyExperts:
        def quantised(e: int) -> Ready:
            w13 = halves(masters.w13[e : e + 1], self._form)[0]
            return Ready([quantize_nvfp4(w13, scales=self._scales)], quantize_nvfp4(masters.w2[e], scales=self._scales))

        return quantised

    def _zeros(self, n: int, k: int) -> torch.Tensor:
        return torch.zeros((self._sizes[0], n, k), dtype=torch.uint8, device=self._device)

    def _arranged(self, ready: ReadyExperts) -> tuple[torch.Tensor, ...]:
        experts, h, i = self._sizes
        padded = -(-i // ROWS) * ROWS
        w13, scales13 = (self._zeros(2 * padded, h // numbers) for numbers in (2, BLOCK))
        w2, scales2 = (self._zeros(h, padded // numbers) for numbers in (2, BLOCK))
        gate, up, down = torch.empty((3, experts), dtype=torch.float32, device=self._device)
        for e in range(experts):
            made = ready(e)
            for half, part in enumerate(reversed(_gate_and_up(made.w13, i))):
                rows = slice(half * padded, half * padded + i)
                w13[e, rows], scales13[e, rows] = part.packed, part.block_scales.view(torch.uint8)
                (up, gate)[half][e] = part.tensor_scale
            w2[e] = F.pad(made.w2.packed, (0, (padded - i) // 2))
            scales2[e] = F.pad(made.w2.block_scales.view(torch.uint8), (0, (padded - i) // BLOCK))
            down[e] = made.w2.tensor_scale
        fp8 = torch.float8_e4m3fn
        # rows of one tensor are copied: what is held is to hold no more than itself
        return self._sglang.arrange(
            LinearExperts(w13, scales13.view(fp8), w2, scales2.view(fp8), gate.clone(), up.clone(), down.clone())
        )


def _gate_and_up(parts: list[NVFP4Tensor], i: int) -> list[NVFP4Tensor]:
    """w13 [2I, H] in one part, with one tensor scale, or gate and up."""
    if len(parts) == 2:
        return parts
    (part,) = parts
    return [
        NVFP4Tensor(part.packed[rows], part.block_scales[rows], part.tensor_scale)
        for rows in (slice(0, i), slice(i, None))
    ]
