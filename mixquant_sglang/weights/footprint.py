"""What a recipe takes of a GPU's memory: BF16 weights, packed copies beside them, KV cache, recurrent states.

Pure arithmetic on a config.json, before or after a server is out of memory: no torch, no SGLang.  Counted for one rank
of ``tp``, of which ``ep`` hold different experts:

- a linear [N, K] takes 2 N K bytes in BF16 and, packed, N K + 4 N in fp8 and 9/16 N K + 4 in nvfp4;
- experts take the same for each of their two matrices, [2 I, H] and [H, I];
- the BF16 master stays beside each packed copy, for decode and protected rows read it; not where decode reads packed
  weights (w8a16, w4a16), which are those of fp8 and nvfp4, so that there is one copy of a linear.

Not counted: norms and biases, padding, CUDA graphs and activations (``MEMORY_SHARE`` leaves room for them),
shared experts that SGLang fuses into the routed ones (a difference of less than 2%).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixquant_sglang import recipe as recipes
from mixquant_sglang.kernels.registry import refusal
from mixquant_sglang.recipe import LayerRule, Recipe
from mixquant_sglang.recipe.capabilities import keeps_master, stored
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED, why_bf16
from mixquant_sglang.recipe.roles import Kind
from mixquant_sglang.recipe.select import Device, Selection, select
from mixquant_sglang.weights.decoder import Block, Decoder, Experts
from mixquant_sglang.weights.decoder_config import read_decoder
from mixquant_sglang.weights.mixers import Attention, DeltaRule

MEMORY_SHARE = 0.9  # [assumed] what SGLang gives to weights and KV pool, about --mem-fraction-static
STATE_RATIO = 0.9  # bytes of recurrent states for each of KV cache: SGLang's --mamba-full-memory-ratio
RANKS = (1, 2, 4, 8, 16, 32, 64)  # that ``smallest_tp`` tries

# What ``that_fit`` tries: recipes that differ in what they pack, and the rule that leaves out most of it.
_TRIED = ("fp8", "nvfp4-fp8-down", "nvfp4-fp8", "nvfp4")
EXPERTS_BF16 = LayerRule(r"re:.*\.experts$", "bf16", "bf16", "experts in bf16")
IN_CHECKPOINT = "BF16 in the checkpoint"
KEEP_EXPERTS = f"with {{match: '{EXPERTS_BF16.match}', prefill: bf16}}"


def packed_bytes(precision: str, n: int, k: int) -> int:
    """Of a weight [n, k] that ``precision`` reads, exactly; nvfp4: codes, a scale for each 16, one FP32; fp8: an FP32
    for each output."""
    sizes = {"bf16": 2 * n * k, "fp8": n * k + 4 * n, "nvfp4": n * k // 2 + n * k // 16 + 4}
    return sizes[stored(precision)]


@dataclass(frozen=True)
class Placed:
    """``count`` modules alike and their precisions: a linear [n, k], or, with ``experts``, all experts of a block on
    one rank: ``copies`` of a pair [n, k] and [k, n / 2]. ``queries`` as in ``Matrix``. ``refusal``: why it
    is in BF16 although low precision is asked for."""

    name: str
    n: int
    k: int
    count: int
    prefill: str
    decode: str
    queries: int = 0
    experts: Experts | None = None
    copies: int = 1
    refusal: str | None = None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """[n, k] of each matrix that a kernel packs."""
        return ((self.n, self.k), (self.k, self.n // 2)) if self.experts else ((self.n, self.k),)

    @property
    def products(self) -> float:
        """Multiplications for a row in one of them."""
        each = min(self.experts.top_k, self.copies) if self.experts else 1
        return each * sum(n * k for n, k in self.sizes)

    @property
    def extra_bytes(self) -> int:
        """Of the packed copies of all of them."""
        kept = {stored(precision) for precision in (self.prefill, self.decode)} - {"bf16"}
        return self.count * sum(self.bytes_in(precision) for precision in kept)

    def bytes_in(self, precision: str) -> int:
        """Of one of them."""
        return self.copies * sum(packed_bytes(precision, n, k) for n, k in self.sizes)


def place(decoder: Decoder, recipe: Recipe, selection: Selection, tp: int = 1, ep: int = 1) -> list[Placed]:
    """Every linear and all experts of one rank in the precisions that the recipe gives them, alike ones together.

    MixQuantError where a rule matches no layer, shards disagree, or the ranks do not divide the model.
    """
    return together(placed for _, placed in by_name(decoder, recipe, selection, tp, ep))


def together(placed: Iterable[Placed]) -> list[Placed]:
    """Alike ones in one, with their ``count``."""
    counts: dict[Placed, int] = {}
    for one in placed:
        counts[one] = counts.get(one, 0) + 1
    return [replace(one, count=count) for one, count in counts.items()]


def by_name(
    decoder: Decoder, recipe: Recipe, selection: Selection, tp: int = 1, ep: int = 1
) -> Iterator[tuple[str, Placed]]:
    """The same, block by block, each with the name that a recipe knows it by."""
    decoder.check(tp, ep)
    matcher = RuleMatcher(recipe.layers, FUSED)
    shapes = {block: _shapes(block, decoder.hidden, tp, ep) for block, _ in decoder.kinds}
    names = []
    low = {selection.prefill, selection.decode} != {"bf16"}
    for at, block in decoder.named():
        for one in shapes[block]:
            name = f"{at}.{one.name}"
            prefill = decode = "bf16"
            if not (why_bf16(name) or one.refusal):
                names.append(name)
                prefill, decode = matcher.precisions(name, selection.prefill, selection.decode)
            asked = sorted({prefill, decode} - {"bf16"})
            refused = next(filter(None, (_refusal(one, each, selection) for each in asked)), None)
            if asked and decoder.in_bf16 is not None and decoder.in_bf16(name, matcher.shards(name)):
                refused = IN_CHECKPOINT
            if refused:
                prefill = decode = "bf16"  # as a server does
            why = (one.refusal if low else None) or refused
            yield name, replace(one, prefill=prefill, decode=decode, refusal=why)
    matcher.check_all_matched(names)


def _refusal(one: Placed, precision: str, selection: Selection) -> str | None:
    """Why no kernel packs it."""
    kernel, capability = selection.kernels[precision], selection.capability
    if one.experts:
        return refusal(precision, kernel, one.n // 2, one.k, Kind.EXPERTS, capability)
    return refusal(precision, kernel, one.n, one.k, capability=capability)


def _shapes(block: Block, hidden: int, tp: int, ep: int) -> list[Placed]:
    """What a block holds on one rank, in BF16."""
    made = [
        Placed(matrix.name, matrix.n, matrix.k, 1, "bf16", "bf16", matrix.queries, refusal=matrix.refusal)
        for matrix in block.matrices(hidden, tp)
    ]
    if block.experts:
        copies, inner = block.experts.share(tp, ep)
        made.append(Placed(block.experts.name, 2 * inner, hidden, 1, "bf16", "bf16", 0, block.experts, copies))
    return made


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU. ``kv_token``: of one more token of context; ``request``: of one more request."""

    embeddings: int
    linears: int
    experts: int
    other: int
    packed_linears: int
    packed_experts: int
    kv_token: int
    request: int

    @property
    def bf16(self) -> int:
        """Of the BF16 weights."""
        return self.embeddings + self.linears + self.experts + self.other

    @property
    def packed(self) -> int:
        return self.packed_linears + self.packed_experts

    @property
    def weights(self) -> int:
        return self.bf16 + self.packed

    def needed(self, tokens: int, requests: int) -> int:
        """With ``tokens`` of context in ``requests``."""
        return self.weights + tokens * self.kv_token + requests * self.request

    def tokens_left(self, memory: float) -> int:
        """Tokens of KV cache that ``memory`` bytes of a GPU have room for; below zero: those that lack. States take
        their share first, as SGLang's ratio has it."""
        room = MEMORY_SHARE * memory - self.weights
        if self.request and room > 0:
            room /= 1 + STATE_RATIO
        return math.floor(room / self.kv_token) if self.kv_token else 0

    def parts(self) -> dict[str, int]:
        """Bytes by part, without those that are zero."""
        made = {part: getattr(self, part) for part in ("embeddings", "linears", "experts", "other")}
        made |= {part: getattr(self, part) for part in ("packed_linears", "packed_experts")}
        return {part: size for part, size in made.items() if size}


def footprint_of(decoder: Decoder, placed: Sequence[Placed], tp: int, ep: int, masters: bool = True) -> Footprint:
    """``placed``: what ``place`` answers. ``masters``: the BF16 weights stay beside packed ones, save where decode
    reads these."""
    linears, experts = 2 * decoder.linear_parameters(tp), 2 * decoder.expert_parameters(tp, ep)
    for one in placed:
        if one.extra_bytes and not (masters and keeps_master(one.prefill, one.decode)):
            size = one.count * one.bytes_in("bf16")
            linears, experts = (linears, experts - size) if one.experts else (linears - size, experts)
    return Footprint(
        embeddings=2 * decoder.embeddings(tp),
        linears=linears,
        experts=experts,
        other=2 * decoder.other_parameters(tp),
        packed_linears=sum(one.extra_bytes for one in placed if not one.experts),
        packed_experts=sum(one.extra_bytes for one in placed if one.experts),
        kv_token=kv_bytes(decoder, tp),
        request=request_bytes(decoder, tp),
    )


def kv_bytes(decoder: Decoder, tp: int) -> int:
    """BF16 keys and values of one more token of context on one GPU."""
    total = 0.0
    for block, count in decoder.kinds:
        share = decoder.window_share if isinstance(block.mixer, Attention) and block.mixer.window else 1.0
        total += count * share * block.mixer.kv_bytes(tp)
    return math.ceil(total)


def request_bytes(decoder: Decoder, tp: int) -> int:
    """Recurrent states of one request on one GPU."""
    kinds = ((block.mixer, count) for block, count in decoder.kinds)
    return sum(count * mixer.request_bytes(tp) for mixer, count in kinds if isinstance(mixer, DeltaRule))


def footprint(
    config: Mapping[str, Any] | Decoder, recipe: Recipe | str, device: Device, tp: int = 1, ep: int = 1
) -> Footprint:
    """What ``recipe`` takes of each GPU ``device`` for a parsed config.json. MixQuantError as ``read_decoder``,
    ``select`` and ``place`` have it."""
    decoder = config if isinstance(config, Decoder) else read_decoder(config, "the model")
    loaded = recipes.load(recipe) if isinstance(recipe, str) else recipe
    return footprint_of(decoder, place(decoder, loaded, select(loaded, device), tp, ep), tp, ep)


def that_fit(
    config: Mapping[str, Any] | Decoder,
    memory: float,
    device: Device,
    tp: int = 1,
    ep: int = 1,
    tokens: int = 1,
    requests: int = 1,
) -> list[tuple[str, Footprint]]:
    """(recipe, footprint) of the shipped recipes, and of them with their experts in BF16, whose weights, states and KV
    cache of ``tokens`` fit into a GPU of ``memory`` bytes; those that gain most come first, bf16 last."""
    decoder = config if isinstance(config, Decoder) else read_decoder(config, "the model")
    tried = [(name, recipes.load(name)) for name in _TRIED]
    if decoder.has_experts:
        tried += [(f"{name} {KEEP_EXPERTS}", keeping_experts(recipe)) for name, recipe in tried]
    tried.append(("bf16", recipes.load("bf16")))
    made = ((name, footprint(decoder, recipe, device, tp, ep)) for name, recipe in tried)
    return [(name, one) for name, one in made if one.needed(tokens, requests) <= MEMORY_SHARE * memory]


def keeping_experts(recipe: Recipe) -> Recipe:
    """The same with its experts in BF16 in both phases."""
    return replace(recipe, layers=(EXPERTS_BF16, *recipe.layers))


def smallest_tp(
    config: Mapping[str, Any] | Decoder, recipe: Recipe | str, device: Device, memory: float, ep: int = 1
) -> int | None:
    """The fewest GPUs of ``memory`` bytes that hold the weights and a token; ``ep`` above 1: all of them split the
    experts. None if 64 are too few or do not divide the model."""
    decoder = config if isinstance(config, Decoder) else read_decoder(config, "the model")
    for tp in RANKS:
        split = tp if ep > 1 else 1
        if decoder.divides(tp, split):
            one = footprint(decoder, recipe, device, tp, split)
            if one.needed(1, 1) <= MEMORY_SHARE * memory:
                return tp
    return None


def shortage(
    config: Mapping[str, Any] | Decoder,
    recipe: Recipe | str,
    device: Device,
    memory: float,
    tp: int = 1,
    ep: int = 1,
) -> str:
    """One line for a server that ran out of memory while it loaded: what the recipe takes of each GPU of ``memory``
    bytes, and what would fit. MixQuantError as ``footprint`` has it."""
    decoder = config if isinstance(config, Decoder) else read_decoder(config, "the model")
    one = footprint(decoder, recipe, device, tp, ep)
    name = recipe if isinstance(recipe, str) else recipe.name
    fewest = smallest_tp(decoder, recipe, device, memory, ep)
    fit = [other for other, _ in that_fit(decoder, memory, device, tp, ep) if other != name]
    kept = f"{one.packed / 1e9:.1f} of it packed beside {one.bf16 / 1e9:.1f} GB of BF16 weights"
    return (
        f"recipe {name} takes {one.weights / 1e9:.1f} GB of each {device} ({kept}) and {one.kv_token / 1e3:.1f} kB for "
        f"each token; about {MEMORY_SHARE * memory / 1e9:.1f} of {memory / 1e9:.1f} GB are for them; it fits on "
        f"{'none' if fewest is None else f'--tp {fewest}'}; on --tp {tp} fit: {', '.join(fit) or 'none'}"
    )
