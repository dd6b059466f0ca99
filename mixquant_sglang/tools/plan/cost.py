"""What a prefill and a decode step cost by roofline: the arithmetic of ``mixquant plan`` (its maths: planner.py)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.limits import FEW_ROWS
from mixquant_sglang.passes.limits import EAGER_PRODUCTS
from mixquant_sglang.tools.plan import data
from mixquant_sglang.tools.plan.data import Gpu, Model

# Of one prefill: what a second of planning can walk through, whatever the prompts and chunks are.
MOST_TOKENS, MOST_PASSES = 50_000_000, 200_000
_WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}  # per element, block scales included
_PARTS = ("linears", "attention", "elementwise", "quantise", "dequantise", "protected", "all_reduce", "fixed")
_INPUT_BYTES = {"bf16": 2.0, "qdq": 2.0, "fp8": 1.0, "nvfp4": 0.5625}
# What writes a linear's input, and the bytes per element of it that this moves beside the result itself.
_BEFORE = {"self_attn.qkv_proj": "norm", "mlp.gate_up_proj": "norm", "mlp.down_proj": "silu"}
_BEFORE_BYTES = {"norm": 6.0, "silu": 4.0}  # x, the residual and its new value; gate and up


@dataclass(frozen=True)
class Workload:
    """Tokens of each of ``batch`` requests: ``input_len`` in the prompt, ``cached`` of them in the radix cache (but one
    is computed in any case, as SGLang does), ``output_len`` generated; ``tp`` GPUs; ``chunk`` prefill tokens per pass,
    None for what SGLang chooses on the GPU. MixQuantError for values that make no sense."""

    input_len: int
    cached: int = 0
    output_len: int = 1
    batch: int = 1
    tp: int = 1
    chunk: int | None = None

    def __post_init__(self) -> None:
        least = {"input_len": 1, "cached": 0, "output_len": 1, "batch": 1, "tp": 1, "chunk": 64}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value <= MOST_TOKENS:
                raise MixQuantError(
                    f"--{name.replace('_', '-')}: {str(value)[:20]} is out of range; allowed: {bound} to {MOST_TOKENS}"
                )
        if self.cached > self.input_len:
            raise MixQuantError(
                f"--cached: {self.cached} tokens are more than the prompt has; allowed: 0 to --input-len, "
                f"which is {self.input_len}"
            )
        if self.new * self.batch > MOST_TOKENS:
            raise MixQuantError(
                f"--input-len, --batch: {self.new} x {self.batch} tokens to prefill; allowed: at most {MOST_TOKENS}"
            )
        if self.chunk is not None and self.new * self.batch > MOST_PASSES * self.chunk:
            raise MixQuantError(
                f"--chunk: {self.new} x {self.batch} tokens in passes of {self.chunk} are more than {MOST_PASSES} "
                f"passes; allowed: at least {-(-self.new * self.batch // MOST_PASSES)}"
            )

    @property
    def new(self) -> int:
        return max(1, self.input_len - self.cached)

    def passes(self, gpu: Gpu) -> Iterator[tuple[int, float, int]]:
        """(token rows, visible keys summed over them, prompts that end) of each prefill pass; requests fill the chunks
        in turn."""
        return self._passes(self.chunk or gpu.chunk)

    def kinds_of_passes(self, gpu: Gpu) -> tuple[tuple[int, int, int, float], ...]:
        """(token rows, prompts that end, how many passes have both, visible keys summed over them all)."""
        return _kinds_of_passes(self, self.chunk or gpu.chunk)

    def _passes(self, chunk: int) -> Iterator[tuple[int, float, int]]:
        left, at = self.new * self.batch, 0
        while left:
            rows, pairs = min(chunk, left), 0.0
            todo = rows
            while todo:  # at most three times: the rest of a prompt, whole prompts, the beginning of one
                begin = at % self.new
                take = min(todo, self.new - begin)
                whole = todo // self.new if not begin and take == self.new else 1
                keys = self.input_len - self.new + begin
                pairs += whole * take * (keys + (take + min(take, data.ATTENTION_TILE)) / 2)
                at, todo = at + whole * take, todo - whole * take
            left -= rows
            yield rows, pairs, at // self.new - (at - rows) // self.new


@functools.lru_cache(maxsize=64)  # one for each point of a plot, which all recipes share
def _kinds_of_passes(work: Workload, chunk: int) -> tuple[tuple[int, int, int, float], ...]:
    kinds: dict[tuple[int, int], tuple[int, float]] = {}
    for rows, pairs, ends in work._passes(chunk):
        count, summed = kinds.get((rows, ends), (0, 0.0))
        kinds[rows, ends] = count + 1, summed + pairs
    return tuple((rows, ends, count, pairs) for (rows, ends), (count, pairs) in kinds.items())


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


class Cost:
    """Seconds become milliseconds here; bytes and FLOPs are those of one of ``tp`` GPUs."""

    def __init__(self, gpu: Gpu, model: Model, tp: int) -> None:
        self.gpu, self.model, self.tp, self.rates = gpu, model, tp, gpu.rates

    def prefill(self, plan: Plan, work: Workload) -> tuple[dict[str, float], float, float]:
        parts = dict.fromkeys(_PARTS, 0.0)
        flops = moved = 0.0
        for rows, ends, count, pairs in work.kinds_of_passes(self.gpu):  # only attention tells more of them apart
            once, once_flops, once_moved = self._pass(plan, rows, ends)
            for name, ms in once.items():
                parts[name] += count * ms
            attention = 4.0 * pairs * self.model.heads / self.tp * self.model.head_dim * self.model.layers
            parts["attention"] += attention / (self._peak("bf16") * self.rates.attention) * 1e3
            flops, moved = flops + count * once_flops + attention, moved + count * once_moved
        return parts, flops, moved

    def _pass(self, plan: Plan, rows: int, ends: int) -> tuple[dict[str, float], float, float]:
        """One pass of ``rows`` in which ``ends`` prompts end, without its attention."""
        parts = dict.fromkeys(_PARTS, 0.0)
        flops = moved = 0.0
        products = plan.mean_products
        protected = min(rows, ends * plan.tail) if plan.protect else 0
        low = rows >= plan.min_tokens and protected < rows
        eager = not protected and rows * products >= EAGER_PRODUCTS
        for linear in plan.linears:
            precision, emulated = (linear.prefill, linear.prefill_emulated) if low else ("bf16", False)
            fused = plan.fused and precision != "bf16" and not (precision == "fp8" and emulated)
            share = 1.0  # of the layers; in the last one, o_proj and the MLP leave out what nobody reads
            if fused and linear.prefill != linear.decode and linear.name != "self_attn.qkv_proj":
                share -= 1 / self.model.layers
            ms, bytes_ = self._linear(plan, linear, precision, emulated, rows, self.rates.copy)
            parts["linears"] += share * ms
            quantise, dequantise = self._conversions(plan, linear, precision, emulated, rows, fused)
            parts["quantise"] += share * quantise
            parts["dequantise"] += share * dequantise
            ms, elementwise = self._before(linear, _format(precision, emulated) if fused else "bf16", rows)
            parts["elementwise"] += ms
            flops += share * 2.0 * rows * linear.n * linear.k * linear.count
            moved += share * bytes_ + elementwise
            if low and plan.protect and linear.prefill != linear.decode and not eager:
                ms, bytes_ = self._protected(plan, linear, protected)
                parts["protected"] += ms
                moved += bytes_
        elementwise = rows * self._elementwise_bytes()
        parts["elementwise"] += self._memory(elementwise, self.rates.copy)
        moved += elementwise
        parts["fixed"] += self.model.layers * self.rates.layer_us / 1e3
        parts["all_reduce"] += self._all_reduce(rows)
        head = 2.0 * self.model.vocab * self.model.hidden / self.tp  # for few rows, so the weights are what it costs
        parts["linears"] += self._memory(head, self.rates.weights)
        moved += head
        return parts, flops, moved

    def decode(self, plan: Plan, batch: int, context: float) -> tuple[float, float, float]:
        head = Linear("lm_head", self.model.vocab // self.tp, self.model.hidden, 1, "bf16", "bf16", False, False)
        ms = flops = moved = 0.0
        for linear in (*plan.linears, head):
            how = linear.decode, linear.decode_emulated, batch
            time, bytes_ = self._linear(plan, linear, *how, self.rates.weights)
            ms, moved = ms + time, moved + bytes_
            flops += 2.0 * batch * linear.n * linear.k * linear.count
            if linear.decode != "bf16":
                ms += sum(self._conversions(plan, linear, *how, fused=False))
                ms += linear.count * self.rates.low_linear_us / 1e3
        kv = batch * context * kv_bytes(self.model, self.tp)
        flops += 4.0 * batch * context * self.model.heads / self.tp * self.model.head_dim * self.model.layers
        ms += self._memory(kv, self.rates.kv) + self._all_reduce(batch)
        ms += self.model.layers * (self.rates.decode_layer_us + self.rates.decode_doubling_us * math.log2(batch)) / 1e3
        return ms, flops, moved + kv

    def _linear(
        self, plan: Plan, linear: Linear, precision: str, emulated: bool, rows: int, memory: float
    ) -> tuple[float, float]:
        """(milliseconds, bytes)."""
        run = "bf16" if emulated else precision
        n, k = linear.n, linear.k
        moved = linear.count * (rows * k * _INPUT_BYTES[run] + n * k * _WEIGHT_BYTES[run] + rows * n * 2.0)
        flops = linear.count * 2.0 * rows * n * k
        curve = self.rates.gemm[run]
        if emulated and precision == "nvfp4":
            curve = self.rates.gemm.get("qdq", curve)
        if plan.stock:
            curve = self.rates.stock_gemm.get(run, curve)
        compute = flops / (self._peak(run) * _at(curve, rows)) * 1e3
        return max(compute, self._memory(moved, memory)), moved

    def _conversions(
        self, plan: Plan, linear: Linear, precision: str, emulated: bool, rows: int, fused: bool
    ) -> tuple[float, float]:
        """(activation quantiser, weight dequantiser), milliseconds; without what ``_before`` does in passing."""
        if precision == "bf16":
            return 0.0, 0.0
        elements = linear.count * rows * linear.k
        form = _format(precision, emulated)
        fraction = _at(self.rates.quantise["alone"][form], rows)
        quantise = dequantise = 0.0
        if form == "nvfp4" and not plan.stock:
            quantise = self._memory(linear.count * rows * linear.n * 4.0, self.rates.copy)  # by row, behind the GEMM
            if not plan.fused:
                quantise += self._memory(elements * 6.0, self.rates.copy)  # the row scales, and x by them
        if plan.stock or (form == "nvfp4" and not plan.fused):
            fraction = self.rates.stock_quantise[form]
        if not fused or linear.name not in _BEFORE:
            quantise += self._memory(elements * (2 + _INPUT_BYTES[form]), fraction)
        if emulated:
            weights = linear.count * linear.n * linear.k * (_WEIGHT_BYTES[precision] + 2)
            dequantise = self._memory(weights, self.rates.dequantise)
        return quantise, dequantise

    def _before(self, linear: Linear, form: str, rows: int) -> tuple[float, float]:
        """(milliseconds, bytes) of the norm or SiLU that writes the input of ``linear`` as ``form``, and of the copy of
        q behind it."""
        ms = moved = 0.0
        before = _BEFORE.get(linear.name)
        if before:
            moved = linear.count * rows * linear.k * (_BEFORE_BYTES[before] + _INPUT_BYTES[form])
            fraction = self.rates.copy if form == "bf16" else _at(self.rates.quantise[before][form], rows)
            ms = self._memory(moved, fraction)
        q = self.model.heads * self.model.head_dim // self.tp
        if linear.name == "self_attn.qkv_proj" and not (form == "fp8" and q % 64 == 0):
            copied = linear.count * rows * q * 4.0
            ms, moved = ms + self._memory(copied, self.rates.q_copy), moved + copied
        return ms, moved

    def _protected(self, plan: Plan, linear: Linear, rows: int) -> tuple[float, float]:
        """(milliseconds, bytes): launched in every pass from a graph, the kernel reads the weights for protected rows
        alone; more of them than it takes are a GEMM of their own, which costs no less."""
        if not rows:
            return linear.count * self.rates.idle_linear_us / 1e3, 0.0
        weights = linear.count * linear.n * linear.k * _WEIGHT_BYTES[linear.decode]
        few, fractions = self.rates.protected
        read = self._memory(weights, fractions[rows > few])
        if rows <= FEW_ROWS:
            return read, weights
        ms, moved = self._linear(plan, linear, linear.decode, linear.decode_emulated, rows, self.rates.copy)
        return max(ms, read), moved

    def _elementwise_bytes(self) -> float:
        """Per token row, beside ``_before``: rope with q and k norms, the KV write; all in BF16."""
        q, kv = self.model.heads * self.model.head_dim / self.tp, self._kv_width()
        return self.model.layers * 2.0 * (2 * (q + kv) + 4 * kv)

    def _kv_width(self) -> float:
        return max(1, self.model.kv_heads // self.tp) * self.model.head_dim

    def _all_reduce(self, rows: int) -> float:
        if self.tp == 1:
            return 0.0
        wire = 2.0 * (self.tp - 1) / self.tp * rows * self.model.hidden * 2 / (self.gpu.link * data.LINK)
        return 2 * self.model.layers * (wire * 1e3 + data.ALL_REDUCE_US / 1e3)

    def _peak(self, precision: str) -> float:
        return self.gpu.tflops[precision] * 1e12

    def _memory(self, bytes_: float, fraction: float) -> float:
        return bytes_ / (self.gpu.bandwidth * fraction) * 1e3


def _at(curve: data.Curve, rows: int) -> float:
    """The fraction at ``rows``: linear in log(rows) between the points, constant beyond them."""
    if rows <= curve[0][0]:
        return curve[0][1]
    for (low, left), (high, right) in pairwise(curve):
        if rows <= high:
            return left + (right - left) * math.log(rows / low) / math.log(high / low)
    return curve[-1][1]


def _format(precision: str, emulated: bool) -> str:
    """That of the activations: BF16 is what an emulated GEMM takes."""
    return "qdq" if emulated else precision


def linear_shapes(model: Model, tp: int) -> list[tuple[str, int, int]]:
    """(name within a layer, N, K) of one rank's four linears, as SGLang fuses them."""
    if model.heads % tp or model.intermediate % tp or (model.kv_heads % tp and tp % model.kv_heads):
        raise MixQuantError(
            f"--tp: {tp} does not divide {model.name} ({model.heads} heads, {model.kv_heads} KV heads, intermediate "
            f"size {model.intermediate}); allowed: a divisor of these"
        )
    q, kv = model.heads // tp * model.head_dim, max(1, model.kv_heads // tp) * model.head_dim
    inner = model.intermediate // tp
    return [
        ("self_attn.qkv_proj", q + 2 * kv, model.hidden),
        ("self_attn.o_proj", model.hidden, q),
        ("mlp.gate_up_proj", 2 * inner, model.hidden),
        ("mlp.down_proj", model.hidden, inner),
    ]


def kv_bytes(model: Model, tp: int) -> int:
    """BF16 keys and values of one token on one GPU."""
    return model.layers * 2 * max(1, model.kv_heads // tp) * model.head_dim * 2


def bf16_bytes(model: Model, tp: int) -> int:
    linears = model.layers * sum(n * k for _, n, k in linear_shapes(model, tp))
    return 2 * (linears + (1 if model.tied else 2) * model.vocab * model.hidden // tp)
