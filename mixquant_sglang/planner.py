"""``mixquant plan``: what a recipe would gain on a GPU, predicted without one.

A roofline with measured efficiencies. Each linear of a prefill pass over M token rows takes

    max(2 M N K / (peak * fraction(precision, M)), bytes / (bandwidth * copy fraction)),

attention 4 * heads * head_dim FLOPs for each (query, visible key), cached prefix included; norms, rope, SiLU and the
quantisers what their bytes take; ``lm_head`` runs for the last row of a prompt. A pass that holds protected rows reads
the weights of the decode precision once more, and SGLang captures that into the graph of every chunk. A decode step
reads weights and KV and has an overhead by layer. The fractions and where they come from: ``planner_data.py``.

Refused: arguments out of range, and what ``planner_data.py`` refuses. Not modelled: passes that mix prefill and decode
rows, passes with more than 64 protected rows (which run without a graph), rates by linear rather than by layer, tile
quantisation at small M. Needs neither a GPU nor torch nor SGLang.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from mixquant_sglang import planner_data as data
from mixquant_sglang import recipe as recipes
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels import Device, select
from mixquant_sglang.matching import RuleMatcher
from mixquant_sglang.planner_data import Gpu, Host, Model, find_gpu, find_model

DEFAULT_RECIPES = ("bf16", "fp8", "nvfp4", "nvfp4-emulated", "nvfp4-everywhere")
BASELINE = "bf16"
_MOST_TOKENS = 50_000_000  # of one prefill: what a second of planning can walk through
STOCK_FP8 = "stock-fp8"  # not a recipe: SGLang's own --quantization fp8, both phases in FP8, for comparison

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # as in config.py
_WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}  # per element, block scales included
_PARTS = ("linears", "attention", "elementwise", "quantise", "dequantise", "protected", "all_reduce", "fixed")
_INPUT_BYTES = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5625}


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
            if value is not None and not bound <= value <= _MOST_TOKENS:
                raise MixQuantError(
                    f"--{name.replace('_', '-')}: {str(value)[:20]} is out of range; allowed: {bound} to {_MOST_TOKENS}"
                )
        if self.cached > self.input_len:
            raise MixQuantError(
                f"--cached: {self.cached} tokens are more than the prompt has; allowed: 0 to --input-len, "
                f"which is {self.input_len}"
            )
        if self.new * self.batch > _MOST_TOKENS:
            raise MixQuantError(
                f"--input-len, --batch: {self.new} x {self.batch} tokens to prefill; allowed: at most {_MOST_TOKENS}"
            )

    @property
    def new(self) -> int:
        return max(1, self.input_len - self.cached)

    def passes(self, gpu: Gpu) -> Iterator[tuple[int, float]]:
        """(token rows, visible keys summed over them) of each prefill pass; requests fill the chunks in turn."""
        chunk = self.chunk or gpu.chunk
        left, at = self.new * self.batch, 0
        while left:
            rows, pairs = min(chunk, left), 0.0
            todo = rows
            while todo:
                begin = at % self.new
                take = min(todo, self.new - begin)
                keys = self.input_len - self.new + begin
                pairs += take * (keys + (take + min(take, data.ATTENTION_TILE)) / 2)
                at, todo = at + take, todo - take
            left -= rows
            yield rows, pairs


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
    """A recipe on a GPU and a model: which linears run how."""

    recipe: str
    describe: str
    linears: tuple[Linear, ...]
    protect: bool
    min_tokens: int
    keeps_bf16: bool  # the BF16 master stays beside the packed weights

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


@dataclass(frozen=True)
class Prediction:
    """Milliseconds for the whole batch: its prefill, one decode step at the mean context. Ratios: above 1 is faster
    than ``bf16``. Bytes and KV tokens per GPU. ``prefill_parts``: milliseconds by cause. ``points``: (FLOP/byte,
    FLOP/s) of the prefill and of a decode step, per GPU."""

    recipe: str
    describe: str
    prefill_ms: float
    decode_ms: float
    prefill_speedup: float
    end_to_end_speedup: float
    extra_weight_bytes: int
    kv_tokens_displaced: int
    fits: bool
    prefill_parts: Mapping[str, float]
    points: Mapping[str, tuple[float, float]]


def make_plan(name: str, model: Model, gpu: Gpu, tp: int = 1, protect: bool | None = None) -> Plan:
    """``name``: a shipped recipe, the path of one, or ``stock-fp8``; ``protect`` overrides its ``last_prompt_token``.

    MixQuantError where the recipe is wrong, asks what the GPU cannot do, or a rule matches no layer.
    """
    shapes = _shapes(model, tp)
    if name == STOCK_FP8:
        stock = tuple(Linear(leaf, n, k, model.layers, "fp8", "fp8", False, False) for leaf, n, k in shapes)
        return Plan(name, "SGLang --quantization fp8", stock, protect=False, min_tokens=1, keeps_bf16=False)
    loaded = recipes.load(name)
    selection = select(loaded, Device(gpu.name, gpu.capability))
    matcher = RuleMatcher(loaded.layers, _FUSED)
    counts: dict[tuple[str, int, int, str, str], int] = {}
    names = []
    for leaf, n, k in shapes:
        for layer in range(model.layers):
            names.append(f"model.layers.{layer}.{leaf}")
            prefill, decode = matcher.precisions(names[-1], selection.prefill, selection.decode)
            key = (leaf, n, k, prefill, decode)
            counts[key] = counts.get(key, 0) + 1
    matcher.check_all_matched(names)
    emulated = {precision for precision, kernel in selection.kernels.items() if kernel == "emulated"}
    linears = []
    for (leaf, n, k, prefill, decode), count in counts.items():
        low = {prefill, decode} - {"bf16"}
        if any(k % 16 or (n % 16 and precision not in emulated and precision == "fp8") for precision in low):
            prefill = decode = "bf16"  # as method.py does with a shape that a kernel refuses
        linears.append(Linear(leaf, n, k, count, prefill, decode, prefill in emulated, decode in emulated))
    kept = loaded.protect_last_prompt_token if protect is None else protect
    return Plan(name, selection.describe(), tuple(linears), kept, loaded.min_tokens, keeps_bf16=True)


def predict(
    plan: Plan, model: Model, gpu: Gpu, work: Workload, baseline: Plan | None = None, host: Host = data.SERVER
) -> Prediction:
    """What ``plan`` takes for ``work``; ``baseline`` is what the ratios are against (the recipe bf16 by default)."""
    baseline = baseline or make_plan(BASELINE, model, gpu, work.tp)
    cost = _Cost(gpu, model, work.tp)
    parts, flops, moved = cost.prefill(plan, work)
    parts["host"] = host.request_ms
    context = work.input_len + work.output_len / 2
    step, step_flops, step_moved = cost.decode(plan, work.batch, context)
    prefill, decode = sum(parts.values()), step + host.step_ms
    if baseline == plan:
        prefill_speedup = end_to_end = 1.0
    else:
        base = predict(baseline, model, gpu, work, baseline, host)
        steps = work.output_len - 1  # the first token comes from the prefill
        prefill_speedup = base.prefill_ms / prefill
        end_to_end = (base.prefill_ms + steps * base.decode_ms) / (prefill + steps * decode)
    kv = _kv_bytes(model, work.tp)
    needed = _bf16_bytes(model, work.tp) + plan.extra_weight_bytes
    needed += work.batch * (work.input_len + work.output_len) * kv
    return Prediction(
        recipe=plan.recipe,
        describe=plan.describe,
        prefill_ms=prefill,
        decode_ms=decode,
        prefill_speedup=prefill_speedup,
        end_to_end_speedup=end_to_end,
        extra_weight_bytes=plan.extra_weight_bytes,
        kv_tokens_displaced=math.ceil(plan.extra_weight_bytes / kv),
        fits=needed <= data.MEMORY_SHARE * gpu.memory,
        prefill_parts=parts,
        points={
            "prefill": (flops / moved, flops / (prefill / 1e3)),
            "decode": (step_flops / step_moved, step_flops / (decode / 1e3)),
        },
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mixquant plan``."""
    parser.add_argument("model", metavar="MODEL", help="a directory with a config.json, or a known name like Qwen3-8B")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(gpu.name for gpu in data.GPUS))
    parser.add_argument("--input-len", required=True, type=int, metavar="L", help="tokens of the prompt")
    parser.add_argument("--cached", type=int, default=0, metavar="C", help="of them in the radix cache (default 0)")
    parser.add_argument("--output-len", type=int, default=256, metavar="N", help="generated tokens (default 256)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests at once (default 1)")
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=list(DEFAULT_RECIPES),
        metavar="NAME|FILE",
        help=f"default: {' '.join(DEFAULT_RECIPES)}; also {STOCK_FP8}: SGLang's own FP8 server",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="GPUS", help="tensor parallel size (default 1)")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="--chunked-prefill-size (default: SGLang's choice)")
    parser.add_argument("--no-protect", action="store_true", help="as with 'protect: {last_prompt_token: false}'")
    parser.add_argument("--json", action="store_true", help="one JSON object, keyed by recipe")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="roofline and speed-up over length")


def run(args: argparse.Namespace) -> int:
    """Prints the table or the JSON; returns 0. MixQuantError, in one line, for whatever the user can mend."""
    gpu, model = find_gpu(args.gpu), find_model(args.model)
    work = Workload(args.input_len, args.cached, args.output_len, args.batch, args.tp, args.chunk)
    protect = False if args.no_protect else None
    plans = [make_plan(name, model, gpu, work.tp, protect) for name in dict.fromkeys(args.recipe)]
    predictions = [predict(plan, model, gpu, work) for plan in plans]
    if args.plot is not None:
        _plot(args.plot, plans, predictions, model, gpu, work)
    print(_json(predictions) if args.json else _table(predictions, model, gpu, work))
    return 0


class _Cost:
    """Seconds become milliseconds here; bytes and FLOPs are those of one of ``tp`` GPUs."""

    def __init__(self, gpu: Gpu, model: Model, tp: int) -> None:
        self.gpu, self.model, self.tp, self.rates = gpu, model, tp, gpu.rates

    def prefill(self, plan: Plan, work: Workload) -> tuple[dict[str, float], float, float]:
        parts = dict.fromkeys(_PARTS, 0.0)
        flops = moved = 0.0
        for rows, pairs in work.passes(self.gpu):
            low = rows >= plan.min_tokens
            for linear in plan.linears:
                precision, emulated = (linear.prefill, linear.prefill_emulated) if low else ("bf16", False)
                ms, bytes_ = self._linear(linear, precision, emulated, rows, self.rates.copy)
                parts["linears"] += ms
                quantise, dequantise = self._conversions(linear, precision, emulated, rows)
                parts["quantise"] += quantise
                parts["dequantise"] += dequantise
                flops += 2.0 * rows * linear.n * linear.k * linear.count
                moved += bytes_
                if low and plan.protect and linear.prefill != linear.decode:
                    weights = linear.count * linear.n * linear.k * _WEIGHT_BYTES[linear.decode]
                    parts["protected"] += self._memory(weights, self.rates.protected)
                    parts["protected"] += linear.count * self.rates.protected_linear_us / 1e3
                    moved += weights
            attention = 4.0 * pairs * self.model.heads / self.tp * self.model.head_dim * self.model.layers
            parts["attention"] += attention / (self._peak("bf16") * self.rates.attention) * 1e3
            elementwise = rows * self._elementwise_bytes()
            parts["elementwise"] += self._memory(elementwise, self.rates.copy)
            flops, moved = flops + attention, moved + elementwise
            parts["fixed"] += self.model.layers * self.rates.layer_us / 1e3
            parts["all_reduce"] += self._all_reduce(rows)
            head = (
                2.0 * self.model.vocab * self.model.hidden / self.tp
            )  # for few rows, so the weights are what it costs
            parts["linears"] += self._memory(head, self.rates.weights)
            moved += head
        return parts, flops, moved

    def decode(self, plan: Plan, batch: int, context: float) -> tuple[float, float, float]:
        head = Linear("lm_head", self.model.vocab // self.tp, self.model.hidden, 1, "bf16", "bf16", False, False)
        ms = flops = moved = 0.0
        for linear in (*plan.linears, head):
            time, bytes_ = self._linear(linear, linear.decode, linear.decode_emulated, batch, self.rates.weights)
            ms, moved = ms + time, moved + bytes_
            flops += 2.0 * batch * linear.n * linear.k * linear.count
            if linear.decode != "bf16":
                ms += sum(self._conversions(linear, linear.decode, linear.decode_emulated, batch))
                ms += linear.count * self.rates.low_linear_us / 1e3
        kv = batch * context * _kv_bytes(self.model, self.tp)
        flops += 4.0 * batch * context * self.model.heads / self.tp * self.model.head_dim * self.model.layers
        ms += self._memory(kv, self.rates.kv) + self._all_reduce(batch)
        ms += self.model.layers * (self.rates.decode_layer_us + self.rates.decode_doubling_us * math.log2(batch)) / 1e3
        return ms, flops, moved + kv

    def _linear(self, linear: Linear, precision: str, emulated: bool, rows: int, memory: float) -> tuple[float, float]:
        run = "bf16" if emulated else precision
        n, k = linear.n, linear.k
        moved = linear.count * (rows * k * _INPUT_BYTES[run] + n * k * _WEIGHT_BYTES[run] + rows * n * 2.0)
        flops = linear.count * 2.0 * rows * n * k
        compute = flops / (self._peak(run) * _at(self.rates.gemm[run], rows)) * 1e3
        return max(compute, self._memory(moved, memory)), moved

    def _conversions(self, linear: Linear, precision: str, emulated: bool, rows: int) -> tuple[float, float]:
        """(activation quantiser, weight dequantiser), milliseconds."""
        if precision == "bf16":
            return 0.0, 0.0
        elements = linear.count * rows * linear.k
        if not emulated:
            return self._memory(elements * (2 + _INPUT_BYTES[precision]), self.rates.quantise[precision]), 0.0
        weights = linear.count * linear.n * linear.k * (_WEIGHT_BYTES[precision] + 2)
        return self._memory(elements * 4.0, self.rates.qdq), self._memory(weights, self.rates.dequantise)

    def _elementwise_bytes(self) -> float:
        """Per token row: two norms with residual, rope with q and k norms, the KV write, SiLU times up; all in BF16."""
        q, kv = self.model.heads * self.model.head_dim / self.tp, self._kv_width()
        norms = 2 * 4 * self.model.hidden
        return self.model.layers * 2.0 * (norms + 2 * (q + kv) + 4 * kv + 3 * self.model.intermediate / self.tp)

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


def _shapes(model: Model, tp: int) -> list[tuple[str, int, int]]:
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


def _kv_bytes(model: Model, tp: int) -> int:
    """BF16 keys and values of one token on one GPU."""
    return model.layers * 2 * max(1, model.kv_heads // tp) * model.head_dim * 2


def _bf16_bytes(model: Model, tp: int) -> int:
    linears = model.layers * sum(n * k for _, n, k in _shapes(model, tp))
    return 2 * (linears + (1 if model.tied else 2) * model.vocab * model.hidden // tp)


def _json(predictions: Sequence[Prediction]) -> str:
    made = {}
    for one in predictions:
        values = asdict(one)
        del values["recipe"], values["points"]
        values["prefill_parts"] = {name: round(ms, 4) for name, ms in one.prefill_parts.items()}
        made[one.recipe] = {key: round(v, 4) if isinstance(v, float) else v for key, v in values.items()}
    return json.dumps(made)


def _table(predictions: Sequence[Prediction], model: Model, gpu: Gpu, work: Workload) -> str:
    """For people; its last line says what the figures are worth."""
    head = (
        f"{model.name} on {'' if work.tp == 1 else f'{work.tp} x '}{gpu.name}: {work.batch} x {work.input_len} input "
        f"tokens ({work.cached} cached), {work.output_len} output tokens, "
        f"{work.chunk or gpu.chunk} tokens per prefill pass"
    )
    width = max(len("recipe"), *(len(one.recipe) for one in predictions))
    lines = [
        head,
        "",
        f"{'recipe':<{width}}  prefill ms  speed-up  decode ms/step  end to end  added weights  KV tokens displaced  "
        "runs as",
    ]
    for one in predictions:
        lines.append(
            f"{one.recipe:<{width}}  {one.prefill_ms:10.2f}  {one.prefill_speedup:7.2f}x  {one.decode_ms:14.2f}  "
            f"{one.end_to_end_speedup:9.2f}x  {one.extra_weight_bytes / 2**20:9.1f} MiB  "
            f"{one.kv_tokens_displaced:19d}  {one.describe}{'' if one.fits else '; DOES NOT FIT into the memory'}"
        )
    return "\n".join([*lines, "", f"Predictions, not measurements. {gpu.name}: {gpu.origin}."])


def _plot(
    file: Path, plans: Sequence[Plan], predictions: Sequence[Prediction], model: Model, gpu: Gpu, work: Workload
) -> None:
    try:
        agg = importlib.import_module("matplotlib.backends.backend_agg")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise MixQuantError("--plot needs matplotlib; run: pip install 'mixquant-sglang[plot]'") from error

    figure = figures.Figure(figsize=(12, 5), layout="constrained")
    agg.FigureCanvasAgg(figure)
    roofline, lengths = figure.subplots(1, 2)
    slope = gpu.bandwidth * gpu.rates.copy
    for precision, peak in gpu.tflops.items():
        roof = peak * 1e12 * max(fraction for _, fraction in gpu.rates.gemm[precision])
        intensity = (0.5, roof / slope, 20000.0)
        roofline.plot(intensity, [min(roof, slope * x) / 1e12 for x in intensity], color="0.6", linewidth=1)
        roofline.annotate(precision, (intensity[-1], roof / 1e12), ha="right", va="bottom", color="0.4")
    for i, one in enumerate(predictions):
        for phase, marker in (("prefill", "o"), ("decode", "s")):
            x, y = one.points[phase]
            label = one.recipe if phase == "prefill" else None
            roofline.plot([x], [y / 1e12], marker, color=f"C{i}", label=label, markersize=7)
    roofline.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s of one GPU")
    roofline.set_title("roofline: prefill (round), decode step (square)")
    roofline.legend(loc="lower right", fontsize="small")

    share = work.cached / work.input_len
    steps = [n for n in (2**i for i in range(8, 18)) if n * work.batch <= _MOST_TOKENS]
    for i, plan in enumerate(plans):
        at = [replace(work, input_len=n, cached=int(n * share)) for n in steps]
        made = [predict(plan, model, gpu, each) for each in at]
        lengths.plot(steps, [one.prefill_speedup for one in made], color=f"C{i}", label=plan.recipe)
        lengths.plot(steps, [one.end_to_end_speedup for one in made], color=f"C{i}", linestyle=":")
    lengths.set_xscale("log", base=2)
    lengths.set(xlabel=f"input tokens ({share:.0%} cached)", ylabel="times the speed of bf16")
    lengths.set_title(f"prefill; dotted: end to end, {work.output_len} output tokens")
    lengths.legend(fontsize="small")
    figure.suptitle(f"{model.name} on {gpu.name}, predicted")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise MixQuantError(f"--plot: {file}: cannot be written: {error}") from error
