"""What mixes the tokens of a block, on one rank of several: matrices as SGLang fuses them, bytes of its cache, FLOPs.

Three kinds: grouped-query attention, latent attention, gated delta rule.  No torch, no SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_OFFERED = "SGLang gives it no quantization config"
DELTA_CHUNK = 64  # tokens that the gated delta rule's prefill kernels take together (sglang, layers/attention/fla)


@dataclass(frozen=True)
class Matrix:
    """A weight [n, k] of one rank; ``name`` within its block. ``queries``: how much of the result are queries that
    attention reads apart from the rest. ``refusal``: why it is BF16 whatever a recipe says."""

    name: str
    n: int
    k: int
    queries: int = 0
    refusal: str | None = None


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. ``window``: tokens that a query sees, None for all; ``gated``: half of the query
    projection is a gate on the result; ``offered``: SGLang builds its linears with a quantization config; ``out``: the
    name of the last."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    gated: bool = False
    offered: bool = True
    out: str = "o_proj"

    def matrices(self, hidden: int, tp: int) -> list[Matrix]:
        q, kv = self.heads // tp * self.head_dim, self.kv_width(tp)
        why = None if self.offered else NOT_OFFERED
        return [
            Matrix("self_attn.qkv_proj", q * (1 + self.gated) + 2 * kv, hidden, q, why),
            Matrix(f"self_attn.{self.out}", hidden, q, 0, why),
        ]

    def kv_width(self, tp: int) -> int:
        """Numbers in the keys, or the values, of one token on one rank; few heads are held several times."""
        return max(1, self.kv_heads // tp) * self.head_dim

    def kv_bytes(self, tp: int) -> int:
        """BF16 keys and values of one token."""
        return 2 * self.kv_width(tp) * 2

    def pair_flops(self, tp: int) -> float:
        """For a query and a key that it sees."""
        return 4.0 * self.heads / tp * self.head_dim

    decode_pair_flops = pair_flops

    def row_bytes(self, tp: int) -> float:
        """Of elementwise kernels for each row: rope with q and k norms, the KV write, the gate."""
        q, kv = self.heads * self.head_dim / tp, self.kv_width(tp)
        return 2.0 * (2 * (q + kv) + 4 * kv) + (6.0 * q if self.gated else 0)

    def indivisible(self, tp: int) -> bool:
        return bool(self.heads % tp or (self.kv_heads % tp and tp % self.kv_heads))

    def sizes(self) -> str:
        return f"{self.heads} heads, {self.kv_heads} KV heads"


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2 and later). ``q_rank`` None: queries come straight from the hidden
    state. The cache holds ``kv_rank + rope`` numbers a token on every rank. Prefill expands keys and values, decode
    absorbs the expansion; SGLang holds it twice (``kv_b_proj`` and ``w_kc``, ``w_vc``)."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int

    window: None = None

    def matrices(self, hidden: int, tp: int) -> list[Matrix]:
        heads, latent = self.heads // tp, self.kv_rank + self.rope
        queries = heads * (self.nope + self.rope)
        if self.q_rank:
            into = [
                Matrix("self_attn.fused_qkv_a_proj_with_mqa", self.q_rank + latent, hidden),
                Matrix("self_attn.q_b_proj", queries, self.q_rank),
            ]
        else:
            into = [
                Matrix("self_attn.q_proj", queries, hidden),
                Matrix("self_attn.kv_a_proj_with_mqa", latent, hidden),
            ]
        return [
            *into,
            Matrix("self_attn.kv_b_proj", heads * (self.nope + self.value), self.kv_rank),
            Matrix("self_attn.o_proj", hidden, heads * self.value),
        ]

    def absorbed(self, tp: int) -> int:
        """Parameters that are held once more for decode."""
        return self.heads // tp * (self.nope + self.value) * self.kv_rank

    def kv_bytes(self, tp: int) -> int:
        return (self.kv_rank + self.rope) * 2

    def pair_flops(self, tp: int) -> float:
        return 2.0 * self.heads / tp * (self.nope + self.rope + self.value)

    def decode_pair_flops(self, tp: int) -> float:
        return 2.0 * self.heads / tp * (2 * self.kv_rank + self.rope)

    def row_bytes(self, tp: int) -> float:
        """Rope and concatenation of q and k, the norm of the latent, its write."""
        heads = self.heads / tp
        return 2.0 * (4 * heads * (self.nope + self.rope) + 4 * (self.kv_rank + self.rope))

    def indivisible(self, tp: int) -> bool:
        return bool(self.heads % tp)

    def sizes(self) -> str:
        return f"{self.heads} heads"


@dataclass(frozen=True)
class DeltaRule:
    """Gated delta rule (Qwen3-Next, Qwen3.5): a state [value heads, value_dim, key_dim] a request in place of a cache
    that grows. ``state_bytes``: of one of its numbers."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    number: int = 4

    window: None = None

    def _widths(self, tp: int) -> tuple[int, int]:
        """Of queries, keys and values, which the convolution sees, and of values."""
        values = self.value_heads // tp * self.value_dim
        return 2 * (self.key_heads // tp) * self.key_dim + values, values

    def matrices(self, hidden: int, tp: int) -> list[Matrix]:
        qkv, values = self._widths(tp)
        return [
            Matrix("linear_attn.in_proj_qkvz", qkv + values, hidden),
            Matrix("linear_attn.in_proj_ba", 2 * (self.value_heads // tp), hidden),
            Matrix("linear_attn.out_proj", hidden, values),
        ]

    def convolution(self, tp: int) -> int:
        """Parameters."""
        return self._widths(tp)[0] * self.kernel

    def kv_bytes(self, tp: int) -> int:
        return 0

    def request_bytes(self, tp: int) -> int:
        """The state of one request, and what the convolution remembers in BF16."""
        heads = self.value_heads // tp
        return heads * self.value_dim * self.key_dim * self.number + self._widths(tp)[0] * (self.kernel - 1) * 2

    def row_flops(self, tp: int) -> float:
        """Of the chunked rule, for each row: within a chunk K K^T, its inverse times K and V, Q K^T and that times V;
        then three products with the state."""
        within = DELTA_CHUNK * (3 * self.key_dim + 2 * self.value_dim)
        return 2.0 * self.value_heads / tp * (within + 3 * self.key_dim * self.value_dim)

    def row_bytes(self, tp: int) -> float:
        """Convolution with SiLU, normalised q and k: read and written twice; the gated norm is before ``out_proj``."""
        return 2.0 * 4 * self._widths(tp)[0]

    def indivisible(self, tp: int) -> bool:
        return bool(self.key_heads % tp or self.value_heads % tp)

    def sizes(self) -> str:
        return f"{self.key_heads} key heads and {self.value_heads} value heads of linear attention"


Mixer = Attention | Latent | DeltaRule
