"""What a recipe makes of a model's linears on a GPU: its rules and the kernels that the GPU has."""

from __future__ import annotations

from mixquant_sglang import recipe as recipes
from mixquant_sglang.kernels.registry import refusal
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.linears import Linear, Plan
from mixquant_sglang.tools.plan.models import Model
from mixquant_sglang.tools.plan.shapes import linear_shapes

STOCK_FP8 = "stock-fp8"  # not a recipe: SGLang's own --quantization fp8, both phases in FP8, for comparison


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
            prefill = decode = "bf16"  # as a server does with a shape that a kernel refuses
        linears.append(Linear(leaf, n, k, count, prefill, decode, prefill in emulated, decode in emulated))
    kept = loaded.protect_last_prompt_token if protect is None else protect
    tail = loaded.protected_tail
    return Plan(name, selection.describe(), tuple(linears), kept, loaded.min_tokens, True, loaded.fuse, tail=tail)
