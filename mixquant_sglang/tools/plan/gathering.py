"""Which passes' attention reads keys and values that were gathered out of their pages, and what that takes.

A server of this project times both at start and gathers from where it pays (``layers/gathered_attention.py``); here the
same is decided by the rates of both. FlashAttention 3 alone, so Hopper alone; the plain attention that a model has
most of; not stock SGLang, and not ``fuse: false``.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

from mixquant_sglang.kernels.limits import GATHERED_BYTES, GATHERED_GAIN, GATHERED_PREFIXES, GATHERED_ROWS
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.rates import Curve, at
from mixquant_sglang.tools.plan.roofline import Roofline
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.mixers import Attention, Latent


@dataclass(frozen=True)
class Gathering:
    """Of the layers with ``mixer``. ``most``: tokens that the scratch of ``scratch`` bytes holds, ``least``: by new
    rows, the shortest prefix behind which it pays, as in ``layers.gathered_attention.Gathering``."""

    mixer: Attention
    most: int
    scratch: int
    least: tuple[tuple[int, int], ...]

    def describe(self) -> str:
        sooner = {prefix: rows for rows, prefix in reversed(self.least)}  # the fewest rows behind each
        ranges = ", ".join(f"{rows} rows behind {prefix}" for prefix, rows in reversed(sooner.items()))
        return (
            "attention reads gathered keys and values (any recipe, not stock SGLang) from "
            f"{ranges} tokens on, up to {self.most} tokens; scratch of at most {self.scratch / 2**20:.0f} MiB"
        )


def gathering_of(plan: Plan, roof: Roofline) -> Gathering | None:
    """None where a server would not gather."""
    mixer = None if roof.wide_heads else _mixer(roof.model)
    if not (plan.gathers and roof.rates.gathered and mixer):
        return None
    token = mixer.kv_bytes(roof.tp)
    most = GATHERED_BYTES // token
    least: dict[int, int] = {}
    for rows in GATHERED_ROWS:
        for prefix in reversed(GATHERED_PREFIXES):
            if rows + prefix > most:
                continue
            pairs = Workload(rows + prefix, cached=prefix).pairs(roof.gpu, None)
            over_pages = pairs * mixer.pair_flops(roof.tp) / roof.attention_rate(mixer) * 1e3
            slowed = pairs / at(roof.rates.gathered, round(pairs / rows))
            whole = roof.gathered(mixer, slowed) + roof.gather(mixer, rows + prefix, 1)
            if over_pages < GATHERED_GAIN * whole:
                break
            least[rows] = prefix
    return Gathering(mixer, most, most * token, tuple(least.items())) if least else None


def attention(
    gathering: Gathering | None, roof: Roofline, mixer: Attention | Latent, work: Workload
) -> tuple[float, float]:
    """Milliseconds of (attention, the copies in front of it) in one layer of all passes."""
    flops = mixer.pair_flops(roof.tp)
    if gathering is None or mixer != gathering.mixer:
        return work.pairs(roof.gpu, mixer.window) * flops / roof.attention_rate(mixer) * 1e3, 0.0
    chunk, curve = work.chunk or roof.gpu.chunk, roof.rates.gathered
    paged, slowed, tokens, passes = _split(work, chunk, gathering.most, gathering.least, curve)
    over_pages = paged * flops / roof.attention_rate(mixer) * 1e3
    return over_pages + roof.gathered(gathering.mixer, slowed), roof.gather(gathering.mixer, tokens, passes)


@functools.lru_cache(maxsize=256)
def _split(
    work: Workload, chunk: int, most: int, least: tuple[tuple[int, int], ...], curve: Curve
) -> tuple[float, float, int, int]:
    """(pairs over pages; pairs of gathered keys, each over the fraction at which they are computed; tokens gathered;
    passes that do)."""
    paged = slowed = 0.0
    tokens = passes = 0
    for one in work.walk(chunk):
        known = [prefix for rows, prefix in least if rows <= one.each]
        if one.tokens <= most and known and one.tokens - one.each >= known[-1]:
            slowed += one.pairs / at(curve, round(one.pairs / one.rows))
            tokens, passes = tokens + one.tokens, passes + 1
        else:
            paged += one.pairs
    return paged, slowed, tokens, passes


def _mixer(model: Decoder) -> Attention | None:
    """That of most layers with plain attention; gpt-oss' has sinks, and is known by linears that stay BF16."""
    found: Counter[Attention] = Counter()
    for block, count in model.kinds:
        if isinstance(block.mixer, Attention) and block.mixer.window is None and block.mixer.offered:
            found[block.mixer] += count
    return found.most_common(1)[0][0] if found else None
