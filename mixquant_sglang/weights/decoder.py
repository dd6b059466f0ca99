"""The shape of a decoder: what each block holds, on one rank of several, as SGLang fuses it.  No torch, no SGLang.

Three kinds of token mixers (grouped-query attention, latent attention, gated delta rule), dense MLPs, and mixtures of
experts with or without shared ones.  ``decoder_config.py`` reads it from a config.json; ``footprint.py`` makes bytes of
it and ``mixquant plan`` milliseconds.  Norms and biases, under 0.1% of the parameters, are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mixquant_sglang.errors import MixQuantError

DELTA_CHUNK = 64  # tokens that the gated delta rule's prefill kernels take together (sglang, layers/attention/fla)


@dataclass(frozen=True)
class Matrix:
    """A weight [n, k] of one rank; ``name`` within its block. ``queries``: how much of the result are queries that
    attention reads apart from the rest."""

    name: str
    n: int
    k: int
    queries: int = 0


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. ``window``: tokens that a query sees, None for all; ``gated``: half of the query
    projection is a gate on the result."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    gated: bool = False

    def matrices(self, hidden: int, tp: int) -> list[Matrix]:
        q, kv = self.heads // tp * self.head_dim, self.kv_width(tp)
        return [
            Matrix("self_attn.qkv_proj", q * (1 + self.gated) + 2 * kv, hidden, q),
            Matrix("self_attn.o_proj", hidden, q),
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


@dataclass(frozen=True)
class Experts:
    """``count`` gated MLPs, of which each token takes ``top_k``; ``shared``: width of one that every token takes as
    well, 0 for none."""

    name: str
    count: int
    top_k: int
    intermediate: int
    shared: int = 0
    shared_name: str = "mlp.shared_experts"

    def distinct(self, rows: float) -> float:
        """Experts that ``rows`` tokens reach, if the router spreads them evenly."""
        return self.count * (1.0 - math.pow(1 - self.top_k / self.count, rows))

    def share(self, tp: int, ep: int) -> tuple[int, int]:
        """(experts, intermediate size) of one rank: ``tp`` ranks of which ``ep`` hold different experts."""
        return self.count // ep, self.intermediate // (tp // ep)

    def indivisible(self, tp: int, ep: int) -> bool:
        return bool(tp % ep or self.count % ep or self.intermediate % (tp // ep) or self.shared % tp)


Mixer = Attention | Latent | DeltaRule


@dataclass(frozen=True)
class Block:
    """``dense``: intermediate size of an MLP that every token takes, 0 for none. ``kept``: parameters that every rank
    holds in BF16 beside these. ``norms``: beyond the two before the mixer and the MLP."""

    mixer: Mixer
    dense: int = 0
    experts: Experts | None = None
    kept: int = 0
    norms: int = 0

    def matrices(self, hidden: int, tp: int) -> list[Matrix]:
        """All but the experts, in the order in which they run."""
        made = self.mixer.matrices(hidden, tp)
        if self.dense:
            made += _mlp("mlp", self.dense // tp, hidden)
        if self.experts:
            made.append(Matrix(f"{self.experts.name.rpartition('.')[0]}.gate", self.experts.count, hidden))
            if self.experts.shared:
                made += _mlp(self.experts.shared_name, self.experts.shared // tp, hidden)
        return made

    def indivisible(self, tp: int, ep: int) -> bool:
        experts = self.experts is not None and self.experts.indivisible(tp, ep)
        return bool(self.mixer.indivisible(tp) or self.dense % tp or experts)


def _mlp(name: str, inner: int, hidden: int) -> list[Matrix]:
    return [Matrix(f"{name}.gate_up_proj", 2 * inner, hidden), Matrix(f"{name}.down_proj", hidden, inner)]


@dataclass(frozen=True)
class Decoder:
    """A language model and what stands before it. ``tied``: the table of tokens is lm_head's weight too. ``tables``:
    parameters of further tables. ``tower``: of the parts for other modalities. ``window_share``: tokens of the cache
    of windowed attention for each of full attention's. ``unread``: what of a config.json is not counted."""

    name: str
    hidden: int
    vocab: int
    tied: bool
    blocks: tuple[Block, ...]
    tables: int = 0
    tower: int = 0
    window_share: float = 1.0
    unread: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @cached_property
    def kinds(self) -> tuple[tuple[Block, int], ...]:
        """Blocks that differ, and how many there are of each."""
        return tuple(Counter(self.blocks).items())

    @property
    def is_plain(self) -> bool:
        """Whether all blocks are alike, each grouped-query attention over all tokens and one MLP: as Llama's."""
        (block, _), *others = self.kinds
        plain = isinstance(block.mixer, Attention) and not (block.mixer.window or block.mixer.gated)
        return not others and plain and block == Block(block.mixer, block.dense)

    @property
    def has_experts(self) -> bool:
        return any(block.experts for block, _ in self.kinds)

    @property
    def has_states(self) -> bool:
        """Whether requests have recurrent states beside their keys and values."""
        return any(isinstance(block.mixer, DeltaRule) for block, _ in self.kinds)

    def named(self) -> Iterator[tuple[str, Block]]:
        """The blocks by the names that a recipe knows them by."""
        for i, block in enumerate(self.blocks):
            yield f"model.layers.{i}", block

    def divides(self, tp: int, ep: int = 1) -> bool:
        """Whether SGLang can spread the model over ``tp`` ranks, its experts over groups of ``ep``."""
        return tp >= ep >= 1 and not any(block.indivisible(tp, ep) for block, _ in self.kinds)

    def check(self, tp: int, ep: int = 1) -> None:
        """MixQuantError if it cannot."""
        if self.divides(tp, ep):
            return
        sizes = dict.fromkeys(block.mixer.sizes() for block, _ in self.kinds)
        sizes |= dict.fromkeys(f"intermediate size {block.dense}" for block, _ in self.kinds if block.dense)
        for experts in (block.experts for block, _ in self.kinds if block.experts):
            sizes[f"{experts.count} experts of intermediate size {experts.intermediate}"] = None
            if experts.shared:
                sizes[f"a shared one of {experts.shared}"] = None
        what = f"--tp: {tp}" if ep == 1 else f"--tp: {tp}, --ep: {ep}:"
        raise MixQuantError(
            f"{what} does not divide {self.name} ({', '.join(sizes)}); allowed: a divisor of these"
            + ("" if ep == 1 else ", and --ep a divisor of --tp and of the experts")
        )

    def embeddings(self, tp: int) -> int:
        """Parameters of the tables of tokens and of an lm_head of its own, on one rank."""
        return (1 if self.tied else 2) * self.vocab * self.hidden // tp + self.tables // tp

    def expert_parameters(self, tp: int = 1, ep: int = 1) -> int:
        """On one rank, without shared ones."""
        total = 0
        for block, count in self.kinds:
            if block.experts:
                experts, inner = block.experts.share(tp, ep)
                total += count * experts * 3 * self.hidden * inner
        return total

    def linear_parameters(self, tp: int = 1) -> int:
        """Of the blocks, without experts, on one rank."""
        return sum(count * sum(m.n * m.k for m in block.matrices(self.hidden, tp)) for block, count in self.kinds)

    def other_parameters(self, tp: int = 1, held: bool = True) -> int:
        """What stays BF16 whatever is asked, beside the tables: convolutions, per-layer inputs, towers (whole on every
        rank). ``held``: as a server holds them; else as a checkpoint does."""
        total = self.tower
        for block, count in self.kinds:
            total += count * block.kept
            if isinstance(block.mixer, DeltaRule):
                total += count * block.mixer.convolution(tp)
            if isinstance(block.mixer, Latent) and held:
                total += count * block.mixer.absorbed(tp)
        return total

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        counted = self.embeddings(1), self.linear_parameters(), self.expert_parameters()
        return sum(counted) + self.other_parameters(held=False)
