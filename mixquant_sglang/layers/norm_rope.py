"""Between qkv_proj and attention, one kernel in prefill: norms of heads, RoPE and the write of the cache.

SGLang runs two or three there, and copies q afterwards where its rows have gaps.  In blocks that were read
(``Family.rope``) the same numbers come from ``kernels/triton/norm_rope.py``.  That they are the same to the last bit is
seen at start, in every layer, against SGLang's own kernels on the shapes that are served; so is from how many rows on
it is faster.  Without the former, and for fewer rows, all is SGLang's.  It is no low precision: every recipe has it.
Decode is SGLang's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch

from mixquant_sglang.kernels.limits import NORM_ROPE_GAIN as GAIN
from mixquant_sglang.kernels.limits import NORM_ROPE_ROWS as ROWS
from mixquant_sglang.kernels.tuning.timing import least
from mixquant_sglang.layers.blocks import rope_of
from mixquant_sglang.layers.fused import norm_source
from mixquant_sglang.versions.attention import attends_plainly
from mixquant_sglang.versions.qk import own_steps, targets, why_not_plain, writes_with_rope

MODES = ("EXTEND", "MIXED")
PROVED = (1, 3, 65)  # rows, in every layer


@dataclass(frozen=True)
class Heads:
    """Of one rank's block: heads of queries, of keys and values, elements of each; whether q and k are normed, and
    whether SGLang's RoPE writes the cache there."""

    queries: int
    keys: int
    size: int
    norm: bool
    at_once: bool


@dataclass
class NormRope:
    """``attentions``: blocks by name, all of ``heads``; ``least``: rows of a pass from which on it is used; ``gains``:
    rows -> how many times as long SGLang's kernels take."""

    heads: Heads
    attentions: Mapping[str, Any]
    tile: Any
    least: int
    gains: Mapping[int, float] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Builtin types only."""
        return {
            "layers": len(self.attentions),
            "from": self.least,
            "gain": {str(rows): round(gain, 3) for rows, gain in self.gains.items()},
        }

    def describe(self) -> str:
        gains = ", ".join(f"{gain:.2f}x at {rows}" for rows, gain in self.gains.items())
        what = "norms of heads, RoPE" if self.heads.norm else "RoPE"
        return (
            f"{what} and the write of the cache are one kernel in prefill passes of {self.least} rows or more, in "
            f"{len(self.attentions)} layers (the same bits; {gains} rows)"
        )


def heads_of(attention: Any) -> Heads:
    kind = rope_of(attention)
    return Heads(
        attention.num_heads, attention.num_kv_heads, attention.head_dim, kind != "rope", kind == "norm_rope_write"
    )


def find(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Blocks that the kernel may be for, of the heads that the first of them has; reason -> names of other blocks of
    known families."""
    found: dict[str, Any] = {}
    others: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if rope_of(module) is None:
            continue
        reason = why_not(module)
        if not reason and found and heads_of(module) != heads_of(next(iter(found.values()))):
            reason = "its heads are others than the first layer's"
        if reason:
            others.setdefault(reason, []).append(name)
        else:
            found[name] = module
    return found, others


def why_not(attention: Any) -> str:
    """Why the kernel is not for a block of a family that has it; empty if it may be."""
    from mixquant_sglang.kernels.triton.norm_rope import SIZES

    heads, inner = heads_of(attention), attention.attn
    if heads.size not in SIZES:
        return f"its heads have {heads.size} elements"
    if not attends_plainly(inner) or inner.v_head_dim != heads.size:
        return "it is not plain causal attention"
    if inner.k_scale is not None or inner.v_scale is not None:
        return "its keys and values are scaled"
    if heads.norm:
        norms = (attention.q_norm, attention.k_norm)
        if any(norm_source(norm) != "norm" for norm in norms) or len({n.variance_epsilon for n in norms}) > 1:
            return "its norms are not SGLang's default"
    if heads.at_once and (attention.use_fused_qk_norm_rope or not attention.compatible_with_fused_kv_buffer):
        return "SGLang runs a fused kernel of its own there"
    return why_not_plain(attention.rotary_emb, heads.size)


def run(
    attention: Any,
    norm: bool,
    tile: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """What ``own_steps`` does, in one kernel; returns q."""
    from mixquant_sglang.kernels.triton.norm_rope import norm_rope_write

    q_norm = attention.q_norm if norm else None
    weights = (q_norm.weight.data, attention.k_norm.weight.data, q_norm.variance_epsilon) if q_norm else None
    cos_sin, size = attention.rotary_emb.cos_sin_cache, attention.head_dim
    return norm_rope_write(q, k, v, weights, cos_sin, positions, slots, keys, values, size, tile)


class _Fused:
    def __init__(self, attention: Any, norm_rope: NormRope, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self._attention = attention
        self._norm_rope = norm_rope

    def takes(self, rows: int, positions: torch.Tensor, forward_batch: Any) -> bool:
        return (
            rows >= self._norm_rope.least
            and forward_batch.forward_mode.name in MODES
            and positions.ndim == 1
            and len(positions) >= rows
            and len(forward_batch.out_cache_loc) >= rows
            and writes_with_rope(forward_batch)
        )

    def parts(self, qkv: Any, positions: torch.Tensor, forward_batch: Any) -> tuple[torch.Tensor, ...]:
        """q, k and v as attention takes them; keys and values are in the cache."""
        attention = self._attention
        q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        keys, values, slots = targets(v, attention.attn, forward_batch)
        of = self._norm_rope
        return run(attention, of.heads.norm, of.tile, q, k, v, positions, keys, values, slots), k, v


class FusedForward(_Fused):
    """Takes the place of a block's ``forward``: qkv_proj, the kernel, attention, o_proj."""

    def __call__(self, positions: torch.Tensor, hidden_states: Any, forward_batch: Any) -> Any:
        if not self.takes(hidden_states.shape[0], positions, forward_batch):
            return self.plain(positions=positions, hidden_states=hidden_states, forward_batch=forward_batch)
        attention = self._attention
        qkv, _ = attention.qkv_proj(hidden_states)
        q, k, v = self.parts(qkv, positions, forward_batch)
        output, _ = attention.o_proj(attention.attn(q, k, v, forward_batch, save_kv_cache=False))
        return output


class FusedApply(_Fused):
    """Takes the place of ``apply_qk_norm_rope``, behind which SGLang writes no cache where its RoPE can."""

    def __call__(self, qkv: Any, positions: torch.Tensor, forward_batch: Any) -> Any:
        if not self.takes(qkv.shape[0], positions, forward_batch):
            return self.plain(qkv, positions, forward_batch)
        self._attention._used_fused_qk_norm_rope_last_call = False
        return self.parts(qkv, positions, forward_batch)


def install(norm_rope: NormRope) -> None:
    for attention in norm_rope.attentions.values():
        if norm_rope.heads.at_once:
            if not isinstance(attention.apply_qk_norm_rope, _Fused):
                attention.apply_qk_norm_rope = FusedApply(attention, norm_rope, attention.apply_qk_norm_rope)
        elif not isinstance(attention.forward, _Fused):
            attention.forward = FusedForward(attention, norm_rope, attention.forward)


# -- what is seen at start ---------------------------------------------------------------------------------------------


def prepare(attentions: Mapping[str, Any], most: int, device: torch.device) -> NormRope | str:
    """``most``: rows of the longest prefill pass.  What is installed, or why nothing is; leaves no memory behind."""
    from mixquant_sglang.kernels.triton.norm_rope import TILES

    heads = heads_of(next(iter(attentions.values())))
    counts = [rows for rows in ROWS if rows <= most]
    if not counts:
        return f"passes are of at most {most} rows"
    sample = Sample(heads, counts[-1], device)
    for name, attention in attentions.items():  # with all tiles: which of them serves is timed behind it
        for rows, tile in product(PROVED, TILES):
            if not same(attention, sample, rows, tile):
                return f"the bits of one kernel are others than theirs, in {name}, of {rows} rows"
    name, first = next(iter(attentions.items()))
    for tile in TILES:
        for rows in counts:
            if not same(first, sample, rows, tile):
                return f"the bits of one kernel are others than theirs, in {name}, of {rows} rows, {tile}"
    tile, gains = fastest(partial(timed, first, sample, device), TILES, counts)
    paying = [*_while_paying(gains)]
    if not paying:
        best = max(gains, key=lambda rows: gains[rows])
        return f"one kernel for all does not pay ({gains[best]:.2f}x at {best} rows)"
    return NormRope(heads, dict(attentions), tile, paying[-1], gains)


def fastest(seconds: Callable[[int, Any], float], tiles: Sequence[Any], counts: Sequence[int]) -> tuple[Any, Any]:
    """The tile that is fastest at the most rows, and its gains; ``seconds`` of a tile, or of SGLang's own for None."""
    tile = min(tiles, key=lambda tile: seconds(counts[-1], tile))
    return tile, {rows: seconds(rows, None) / seconds(rows, tile) for rows in counts}


def _while_paying(gains: Mapping[int, float]) -> Iterator[int]:
    """From the most rows down to the least without a gap."""
    for rows, gain in sorted(gains.items(), reverse=True):
        if gain < GAIN:
            return
        yield rows


class Sample:
    """Random rows of a qkv_proj's result, of magnitudes from 2^-8 to 2^8, zeros among them; where they stand in their
    sequences, as shares of the longest; and two caches."""

    def __init__(self, heads: Heads, rows: int, device: torch.device) -> None:
        seed = torch.Generator(device).manual_seed(0)
        random = partial(torch.rand, generator=seed, device=device)
        self.sizes = [heads.queries * heads.size, heads.keys * heads.size, heads.keys * heads.size]
        x = torch.randn(rows, sum(self.sizes), generator=seed, device=device) * torch.exp2(16 * random(rows, 1) - 8)
        x[2::7] *= random(len(x[2::7]), x.shape[1]) < 0.5
        x[4::64] = 0
        self.qkv = x.bfloat16()
        self.places = random(rows)
        self.slots = torch.randperm(rows, generator=seed, device=device) + 1
        self.caches = [torch.full((2, rows + 1, self.sizes[1]), 3.0, dtype=torch.bfloat16, device=device) for _ in "ab"]

    def arguments(self, attention: Any, rows: int, which: int) -> dict[str, torch.Tensor]:
        """Of ``own_steps`` and ``run``, on memory of their own but for cache ``which``."""
        q, k, v = torch.split(self.qkv[:rows].clone(), self.sizes, dim=-1)
        longest = len(attention.rotary_emb.cos_sin_cache)
        positions = (self.places[:rows] * (longest - 1)).long()
        keys, values = self.caches[which]
        cache = {"keys": keys, "values": values, "slots": self.slots[:rows]}
        return {"q": q, "k": k, "v": v, "positions": positions, **cache}


def same(attention: Any, sample: Sample, rows: int, tile: Any) -> bool:
    """Whether q, k and both caches come out the same to the bit."""
    heads = heads_of(attention)
    own, ours = (sample.arguments(attention, rows, which) for which in (0, 1))
    q, k = own_steps(attention, **own, norm=heads.norm, at_once=heads.at_once)
    out = run(attention, heads.norm, tile, **ours)
    pairs = [(q.reshape(out.shape), out), (k.reshape(rows, -1), ours["k"]), (sample.caches[0], sample.caches[1])]
    return all(torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16)) for a, b in pairs)


def timed(attention: Any, sample: Sample, device: torch.device, rows: int, tile: Any) -> float:
    """Seconds of ``run`` with ``tile``, or of ``own_steps`` for None: the least of several times eight calls, which
    wait on the device for each other alone."""
    heads = heads_of(attention)
    arguments = sample.arguments(attention, rows, 0)
    call: Callable[[], Any]
    if tile is None:
        call = partial(own_steps, attention, **arguments, norm=heads.norm, at_once=heads.at_once)
    else:
        call = partial(run, attention, heads.norm, tile, **arguments)
    call()

    def once() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(4_000_000)  # type: ignore[no-untyped-call]  # launches queue up behind it
        began.record()
        for _ in range(8):
            call()
        ended.record()
        torch.cuda.synchronize(device)
        return float(began.elapsed_time(ended)) / 8e3

    return least(once)
