"""``mixquant plan``: what a recipe would gain on a GPU, predicted without one.

A roofline with measured efficiencies. Each linear of a prefill pass over M token rows takes

    max(2 M N K / (peak * fraction(precision, M)), bytes / (bandwidth * copy fraction)),

attention 4 * heads * head_dim FLOPs for each (query, visible key), cached prefix included; norms, rope, SiLU and the
quantisers what their bytes take; ``lm_head`` runs for the last row of a prompt. Low precision quantises within the
norms and SiLU (in "elementwise"; "quantise" is what remains by itself), FP8 spares SGLang's copy of q, and the last
layer computes o_proj and the MLP for the rows that are read; ``prefill: {fuse: false}`` turns these off. A pass in
which prompts end reads the weights of the decode precision once more for its protected rows; small ones in which none
does pay for the launches. A decode step reads weights and KV and has an overhead by layer. The fractions and where they
come from: ``data.py``.

Refused: arguments out of range, and what ``data.py`` refuses. Not modelled: passes that mix prefill and decode
rows, that passes with more than 64 protected rows run without a graph, rates by linear rather than by layer, which
linears the last layer has in low precision (each counts by 1 / layers), blocks that are not fused, tile quantisation at
small M. Needs neither a GPU nor torch nor SGLang.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mixquant_sglang import recipe as recipes
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.registry import refusal
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED as FUSED
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.plan import data
from mixquant_sglang.tools.plan.cost import (
    MOST_TOKENS,
    Cost,
    Linear,
    Plan,
    Workload,
    bf16_bytes,
    kv_bytes,
    linear_shapes,
)
from mixquant_sglang.tools.plan.data import Gpu, Host, Model, find_gpu, find_model

DEFAULT_RECIPES = ("bf16", "fp8", "nvfp4", "nvfp4-fp8", "nvfp4-emulated", "nvfp4-everywhere")
BASELINE = "bf16"
STOCK_FP8 = "stock-fp8"  # not a recipe: SGLang's own --quantization fp8, both phases in FP8, for comparison


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
    shapes = linear_shapes(model, tp)
    if name == STOCK_FP8:
        stock = tuple(Linear(leaf, n, k, model.layers, "fp8", "fp8", False, False) for leaf, n, k in shapes)
        return Plan(
            name, "SGLang --quantization fp8", stock, False, min_tokens=1, keeps_bf16=False, fused=False, stock=True
        )
    loaded = recipes.load(name)
    selection = select(loaded, Device(gpu.name, gpu.capability))
    matcher = RuleMatcher(loaded.layers, FUSED)
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
        if any(refusal(precision, selection.kernels[precision], n, k) for precision in low):
            prefill = decode = "bf16"  # as layers/linear.py does with a shape that a kernel refuses
        linears.append(Linear(leaf, n, k, count, prefill, decode, prefill in emulated, decode in emulated))
    kept = loaded.protect_last_prompt_token if protect is None else protect
    tail = loaded.protected_tail
    return Plan(name, selection.describe(), tuple(linears), kept, loaded.min_tokens, True, loaded.fuse, tail=tail)


def predict(
    plan: Plan, model: Model, gpu: Gpu, work: Workload, baseline: Plan | None = None, host: Host = data.SERVER
) -> Prediction:
    """What ``plan`` takes for ``work``; ``baseline`` is what the ratios are against (the recipe bf16 by default)."""
    baseline = baseline or make_plan(BASELINE, model, gpu, work.tp)
    cost = Cost(gpu, model, work.tp)
    parts, flops, moved = cost.prefill(plan, work)
    parts["host"] = host.request_ms + host.token_us * work.input_len * work.batch / 1e3
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
    kv = kv_bytes(model, work.tp)
    needed = bf16_bytes(model, work.tp) + plan.extra_weight_bytes
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
    steps = [n for n in (2**i for i in range(8, 18)) if n * work.batch <= MOST_TOKENS]
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
