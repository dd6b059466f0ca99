"""Predictions as a picture: the roofline, and the speed-up over the length of the prompt. Needs matplotlib."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.tools.plan.predict import Prediction, predict
from mixquant_sglang.tools.plan.workload import MOST_TOKENS, Workload
from mixquant_sglang.weights.decoder import Decoder


def save(
    file: Path, plans: Sequence[Plan], predictions: Sequence[Prediction], model: Decoder, gpu: Gpu, work: Workload
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
    lengths.set(xlabel=f"input tokens ({share:.0%} cached)", ylabel="times the speed of stock SGLang in BF16")
    lengths.set_title(f"prefill; dotted: end to end, {work.output_len} output tokens")
    lengths.legend(fontsize="small")
    figure.suptitle(f"{model.name} on {gpu.name}, predicted")
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise MixQuantError(f"--plot: {file}: cannot be written: {error}") from error
