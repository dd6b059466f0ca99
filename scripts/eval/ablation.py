"""What each choice of a recipe buys, and what it costs: the table and the figure of ``eval_accuracy --ablation``.

Quality is measured on the small model. Speed is predicted (``mixquant plan``) for Qwen3-8B, where native NVFP4 runs:
the small model would not show it, and emulated NVFP4 is not fast. Two layers at the edges are a quarter of the small
model and an eighteenth of Qwen3-8B, which is in favour of ``edges-bf16``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from scripts.eval.arms import write_recipes
from scripts.eval.report import Results, figure, table

MODEL, GPU, TOKENS = "Qwen3-8B", "B200", 8192


def speeds(arms: list[str]) -> dict[str, float]:
    """The predicted prefill speed-up over stock SGLang in BF16, by arm."""
    from mixquant_sglang.tools.plan.gpus import find_gpu
    from mixquant_sglang.tools.plan.models import find_model
    from mixquant_sglang.tools.plan.predict import predict
    from mixquant_sglang.tools.plan.recipes import make_plan
    from mixquant_sglang.tools.plan.workload import Workload

    model, gpu = find_model(MODEL), find_gpu(GPU)
    work = Workload(input_len=TOKENS)
    with tempfile.TemporaryDirectory(prefix="eval_ablation_") as folder:
        files = write_recipes(Path(folder), arms, model.layers)
        plans = [make_plan(file, model, gpu) for file in files]
    return {arm: predict(plan, model, gpu, work).prefill_speedup for arm, plan in zip(arms, plans, strict=True)}


def tradeoff(results: Results, fast: dict[str, float]) -> str:
    """One row for each arm: KL at the first and at every token of the answer, accuracy against BF16's, speed."""
    every = results["all"]
    rows = []
    for arm, speed in fast.items():
        minus = every["accuracy"]["minus"].get(f"{arm} - bf16")
        cells = [figure(every[measure]["value"][arm]) for measure in ("first", "kl")]
        rows.append((arm, [*cells, figure(minus, True) if minus else "-", f"{speed:.2f}x"]))
    columns = ["KL, first token", "KL, all tokens", "accuracy - bf16", f"{GPU}, predicted"]
    return table(f"quality and prefill speed ({MODEL}, {TOKENS} tokens) [95% interval]", columns, rows)


def plot_tradeoff(results: Results, fast: dict[str, float], path: Path, title: str) -> bool:
    """KL over speed, a point for each arm; False if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2, figsize=(14, 6), layout="constrained")
    for axis, measure, name in zip(axes, ("first", "kl"), ("first token", "all tokens"), strict=True):
        found: dict[str, Any] = {arm: results["all"][measure]["value"][arm] for arm in fast if arm != "bf16"}
        for arm, (value, low, high) in found.items():
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.errorbar(fast[arm], value, error, fmt="o", capsize=2, markersize=5)
            axis.annotate(arm, (fast[arm], value), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axis.set_yscale("log")
        axis.set_xlabel(f"prefill speed-up, {MODEL}, {TOKENS} tokens, {GPU} (predicted)")
        axis.set_ylabel(f"KL from BF16, {name} of the answer, nats")
    drawing.suptitle(title, fontsize=9)
    drawing.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(drawing)
    return True
