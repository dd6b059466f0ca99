"""FP8 on tensor cores (SM89 and newer) through SGLang's own kernels, which the package ``sgl_kernel`` holds.

    y[m, n] = sx[m] * sw[n] * sum_k xq[m, k] wq[n, k],   xq, wq in E4M3

Scales are dynamic per token and fixed per output channel, as in SGLang's ``w8a8_fp8``: no row depends on another.
Refuses weights whose N or K is not a multiple of 16 (CUTLASS wants 16-byte rows).
"""

from __future__ import annotations

import torch

from mixquant_sglang.formats import fp8
from mixquant_sglang.kernels.base import PackedLinear, copy_all


class NativeFP8(PackedLinear):
    precision = "fp8"
    kernel = "native"

    def __init__(self, weight: torch.Tensor, *, scales: str = "search") -> None:
        packed = fp8.quantize(weight)
        self._weight = packed.data  # [N, K] row major, so its transpose is the column-major operand that CUTLASS wants
        self._scales = packed.scales

    @classmethod
    def refusal(cls, n: int, k: int) -> str | None:
        return f"[{n}, {k}] is not a multiple of 16 in both sizes" if n % 16 or k % 16 else None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self._weight, self._scales

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        import sgl_kernel

        if x.shape[0] == 0:
            return x.new_empty(0, self._weight.shape[0])
        xq = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        x_scales = x.new_empty(x.shape[0], 1, dtype=torch.float32)
        sgl_kernel.sgl_per_token_quant_fp8(x, xq, x_scales)
        out: torch.Tensor = sgl_kernel.fp8_scaled_mm(
            xq, self._weight.t(), x_scales, self._scales[:, None], out_dtype=x.dtype, bias=bias
        )
        return out

    def refresh(self, weight: torch.Tensor) -> bool:
        fresh = fp8.quantize(weight)
        copy_all(self.tensors(), (fresh.data, fresh.scales))
        return True
