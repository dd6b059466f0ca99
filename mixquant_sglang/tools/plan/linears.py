"""Which linears run how: a recipe on a model and a GPU, as ``mixquant plan`` counts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """``count`` linears [n, k] of one rank and what executes them: a precision and its kernel by phase."""

    name: str
    n: int
    k: int
    count: int
    prefill: str
    decode: str
    prefill_emulated: bool
    decode_emulated: bool

    def packed_bytes(self, precision: str) -> int:
        """Of one linear; exact: nvfp4 N*K/2 codes + N*K/16 scales + one FP32, fp8 N*K + an FP32 per output channel."""
        n, k = self.n, self.k
        return {"bf16": 2 * n * k, "fp8": n * k + 4 * n, "nvfp4": n * k // 2 + n * k // 16 + 4}[precision]


@dataclass(frozen=True)
class Plan:
    """A recipe on a GPU and a model: which linears run how. ``fused``: prefill quantises within norms and SiLU, writes
    q apart and leaves out the last layer's unread rows. ``stock``: another server's low precision, so never fused."""

    recipe: str
    describe: str
    linears: tuple[Linear, ...]
    protect: bool
    min_tokens: int
    keeps_bf16: bool  # the BF16 master stays beside the packed weights
    fused: bool = True
    stock: bool = False
    tail: int = 1  # tokens at the end of each prompt that ``protect`` keeps in the decode precision

    @property
    def mean_products(self) -> float:
        """Multiplications for each row of a linear that prefill quantises, on average."""
        low = [linear for linear in self.linears if linear.prefill != "bf16"]
        return sum(x.n * x.k * x.count for x in low) / max(1, sum(x.count for x in low))

    @property
    def extra_weight_bytes(self) -> int:
        """Bytes per GPU beside the BF16 weights; below zero where they are replaced (stock-fp8)."""
        extra = 0
        for linear in self.linears:
            for precision in {linear.prefill, linear.decode} - {"bf16"}:
                extra += linear.count * linear.packed_bytes(precision)
            if not self.keeps_bf16:
                extra -= linear.count * linear.packed_bytes("bf16")
        return extra
