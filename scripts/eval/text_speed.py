"""What eval_text found over what ``mixquant plan`` predicts: how much of W4A4's loss comes back, and at what speed.

Quality is the measured model's; speed is predicted for a larger one, on a GPU that need not be there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.eval.report import Results
from scripts.eval.text_report import plot, share

MODEL, TOKENS = "Qwen3-8B", 8192
NUMBERED = re.compile(r"layers\\?\.[(\[]?\d")
Speeds = dict[str, dict[str, float | None]]  # {GPU: {arm: speed-up, None: it has none there}}


def unpriced(gpus: Sequence[str]) -> str:
    """What ``mixquant plan`` says of the first GPU that it does not know; empty where it knows all."""
    from mixquant_sglang.errors import MixQuantError
    from mixquant_sglang.tools.plan.gpus import find_gpu

    for name in gpus:
        try:
            find_gpu(name)
        except MixQuantError as error:
            return str(error).removeprefix("--gpu: ")
    return ""


def speeds(arms: Sequence[str], recipes: Mapping[str, str], gpus: Sequence[str]) -> Speeds:
    """The predicted prefill speed-up over stock SGLang in BF16.  ``recipes``: the text of arms that are not shipped."""
    from mixquant_sglang.errors import MixQuantError
    from mixquant_sglang.tools.plan.gpus import find_gpu
    from mixquant_sglang.tools.plan.models import find_model
    from mixquant_sglang.tools.plan.predict import predict
    from mixquant_sglang.tools.plan.recipes import make_plan
    from mixquant_sglang.tools.plan.workload import Workload

    model, work = find_model(MODEL), Workload(input_len=TOKENS)
    found: Speeds = {}
    with tempfile.TemporaryDirectory(prefix="eval_text_") as folder:
        files = {arm: Path(folder, f"{arm}.yaml") for arm in arms if arm in recipes}
        for arm, file in files.items():
            file.write_text(recipes[arm])
        for name in gpus:
            gpu = find_gpu(name)
            found[name] = {}
            for arm in arms:
                if NUMBERED.search(recipes.get(arm, "")):
                    print(f"{arm}: its rules name layers by number, which are not those of {MODEL}", file=sys.stderr)
                    found[name][arm] = None
                    continue
                try:
                    plan = make_plan(str(files.get(arm, arm)), model, gpu)
                except MixQuantError as error:
                    print(f"{arm} on {name}: {error}", file=sys.stderr)
                    found[name][arm] = None
                else:
                    found[name][arm] = predict(plan, model, gpu, work).prefill_speedup
    return found


def speed_table(results: Results, fast: Speeds) -> str:
    """In Markdown, a row for each arm."""
    back: dict[str, Any] = results["all"]["kl"]["recovered"]
    lines = [f"| arm | KL taken back | {' | '.join(f'{gpu}, predicted' for gpu in fast)} |"]
    lines.append("|---|---|" + "---|" * len(fast))
    for arm in next(iter(fast.values())):
        speed = " | ".join("none" if found[arm] is None else f"{found[arm]:.2f}x" for found in fast.values())
        lines.append(f"| {arm} | {share(back[arm]) if arm in back else '-'} | {speed} |")
    return f"prefill of {MODEL}, {TOKENS} tokens, over stock BF16\n\n" + "\n".join(lines)


def plot_speed(results: Results, fast: Speeds, path: Path, title: str) -> bool:
    """Of W4A4's KL what is left over the speed, a point for each arm; False if matplotlib is not there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    drawing, axes = pyplot.subplots(1, len(fast), figsize=(6.5 * len(fast), 5), layout="constrained", squeeze=False)
    back: dict[str, Any] = results["all"]["kl"]["recovered"]
    for axis, (gpu, found) in zip(axes[0], fast.items(), strict=True):
        for arm, speed in found.items():
            if back.get(arm) is None or speed is None:
                continue
            value, low, high = (100 * (1 - x) for x in back[arm])
            error = [[max(0.0, value - high)], [max(0.0, low - value)]]
            axis.errorbar(speed, value, error, fmt="o", capsize=2, markersize=5)
            axis.annotate(arm, (speed, value), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set_xlabel(f"prefill speed-up, {MODEL}, {TOKENS} tokens, {gpu} (predicted)")
        axis.set_ylabel("KL that is left, % of nvfp4-everywhere's")
    drawing.suptitle(textwrap.fill(title, 140), fontsize=8)
    drawing.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(drawing)
    return True


def priced(args: argparse.Namespace, results: Results, arms: list[str], head: str) -> str:
    """The table of predicted speeds, which it also draws; empty without --price."""
    known = [arm for arm in arms if not arm.startswith("stock-")]
    if not args.price or not known:
        return ""
    fast = speeds(known, args.recipes, args.price)
    if not plot_speed(results, fast, args.out / "speed.png", head):
        print("(no picture: matplotlib is not installed)", file=sys.stderr)
    return f"{speed_table(results, fast)}\n"


def redraw(args: argparse.Namespace) -> None:
    """The pictures of a run's results.json; --price is of the arms that are asked for."""
    file = args.out / "results.json"
    if not file.is_file():
        raise SystemExit(f"--redraw: {file} is not there")
    full = json.loads(file.read_text())
    if "all" not in full["results"] or "kl" not in full["results"]["all"] or "head" not in full:
        raise SystemExit(f"--redraw: {file} is not of windows, or of an older eval_text")
    if not plot(full["results"], full["arms"], args.out / "text.png", full["head"]):
        print("(no picture: matplotlib is not installed)", file=sys.stderr)
    print(priced(args, full["results"], [arm for arm in full["arms"] if arm in args.arms], full["head"]))
