"""What a recipe makes of a model's linears and experts on a GPU: its rules and the kernels that the GPU has."""

from __future__ import annotations

from mixquant_sglang import recipe as recipes
from mixquant_sglang.recipe.select import Device, Selection, select
from mixquant_sglang.tools.plan.gpus import Gpu
from mixquant_sglang.tools.plan.linears import Plan
from mixquant_sglang.weights.decoder import Decoder
from mixquant_sglang.weights.footprint import place

# Not recipes, for comparison: SGLang as it is, in BF16 and with its own --quantization fp8, both phases in FP8.
STOCK_BF16, STOCK_FP8 = "stock-bf16", "stock-fp8"
_STOCK = {STOCK_BF16: ("bf16", "SGLang, BF16"), STOCK_FP8: ("fp8", "SGLang --quantization fp8")}


def make_plan(name: str, model: Decoder, gpu: Gpu, tp: int = 1, protect: bool | None = None, ep: int = 1) -> Plan:
    """``name``: a shipped recipe, the path of one, ``stock-bf16`` or ``stock-fp8``; ``protect`` overrides its
    ``last_prompt_token``.

    MixQuantError where the recipe is wrong, asks what the GPU cannot do, or a rule matches no layer.
    """
    if name in _STOCK:
        precision, describe = _STOCK[name]
        stock = place(model, recipes.load("bf16"), Selection(precision, precision, {"fp8": "native"}, ""), tp, ep)
        return Plan(name, describe, tuple(stock), False, 1, keeps_bf16=False, fused=False, stock=True)
    loaded = recipes.load(name)
    selection = select(loaded, Device(gpu.name, gpu.capability))
    emulated = frozenset(precision for precision, kernel in selection.kernels.items() if kernel == "emulated")
    attention = "" if loaded.attention == "bf16" else f"; attention in {loaded.attention} is predicted as in bf16"
    return Plan(
        name,
        selection.describe() + attention,
        tuple(place(model, loaded, selection, tp, ep)),
        loaded.protect_last_prompt_token if protect is None else protect,
        loaded.min_tokens or 1,
        keeps_bf16=True,
        emulated=emulated,
        fused=loaded.fuse and model.is_plain,
        gathers=loaded.fuse,
        measures=loaded.min_tokens is None and selection.decode == "bf16" and not emulated,
        tail=loaded.protected_tail,
    )
