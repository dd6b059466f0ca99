"""The shape of a decoder: what each block holds, on one rank of several, as SGLang fuses it.  No torch, no SGLang.

Token mixers (``mixers.py``), dense MLPs, and mixtures of experts with or without shared ones.  ``decoder_config.py``
reads it from a config.json; ``footprint.py`` makes bytes of it and ``mixquant plan`` milliseconds.  Norms and biases,
under 0.1% of the parameters, are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.weights.mixers import Attention, DeltaRule, Latent, Matrix, Mixer


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


@dataclass(frozen=True)
class Block:
    """``dense``: intermediate size of an MLP that every token takes, 0 for none; ``mlp``: its name; ``halves``: its
    linears where it has no gate. ``kept``: parameters that every rank holds in BF16 beside these. ``norms``: beyond the
    two before the mixer and the MLP."""

    mixer: Mixer
    dense: int = 0
    experts: Experts | None = None
    kept: int = 0
    norms: int = 0
    mlp: str = "mlp"
    halves: tuple[str, str] | None = None

    def matrices(self, hidden: int, tp: int) -> list[Matrix]:
        """All but the experts, in the order in which they run."""
        made = self.mixer.matrices(hidden, tp)
        inner = self.dense // tp
        if self.dense and self.halves:
            up, down = (f"{self.mlp}.{half}" for half in self.halves)
            made += [Matrix(up, inner, hidden), Matrix(down, hidden, inner)]
        elif self.dense:
            made += _mlp(self.mlp, inner, hidden)
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
    of windowed attention for each of full attention's. ``unread``: what of a config.json is not counted. ``in_bf16``:
    of a quantised checkpoint, whether it has a linear, or experts, in BF16, by name and shards."""

    name: str
    hidden: int
    vocab: int
    tied: bool
    blocks: tuple[Block, ...]
    tables: int = 0
    tower: int = 0
    window_share: float = 1.0
    unread: tuple[str, ...] = ()
    in_bf16: Callable[[str, Sequence[str]], bool] | None = None

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
        if others or not isinstance(block.mixer, Attention) or block != Block(block.mixer, block.dense):
            return False
        return block.mixer == Attention(block.mixer.heads, block.mixer.kv_heads, block.mixer.head_dim)

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
