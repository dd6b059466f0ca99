"""``mixquant plan``: what a recipe would gain on a GPU, predicted without one.

A roofline with measured efficiencies. Each linear of a prefill pass over M token rows takes

    max(2 M N K / (peak * fraction(precision, M)), bytes / (bandwidth * copy fraction)),

attention 4 * heads * head_dim FLOPs for each (query, visible key), cached prefix included; norms, rope, SiLU and the
quantisers what their bytes take; ``lm_head`` runs for the last row of a prompt. Low precision quantises within the
norms and SiLU (in "elementwise"; "quantise" is what remains by itself), FP8 spares SGLang's copy of q, and the last
layer computes o_proj and the MLP for the rows that are read; ``prefill: {fuse: false}`` turns these off. A pass in
which prompts end reads the weights of the decode precision once more for its protected rows; small ones in which none
does pay for the launches. A decode step reads weights and KV and has an overhead by layer. The fractions and where they
come from: ``rates.py``. Ratios are over stock SGLang in BF16, ``stock-bf16``.

On Hopper, attention behind long prefixes reads gathered keys and values in every recipe, not in stock SGLang:
``gathering.py``. Its scratch counts as memory.

Experts (``cost_experts.py``) are grouped GEMMs at a rate over rows for each expert, read no more experts than tokens
reach, and move a row for each token and expert; protected rows read experts of their own. Attention goes by layer:
windows see their tokens, latent attention expands in prefill and absorbs in decode, the gated delta rule takes FLOPs
for each row and a state in place of a cache. Blocks other than Llama-like ones are planned without fusion. What a
recipe takes of the memory: ``memory.py``; from how many tokens on it pays: ``advice.py``. Short passes of hybrids wait
for the host: they take what was measured of one model (``hosts.py``), and the output says so.

A checkpoint that is quantised already is planned with the recipe that takes it, against its dimensions in BF16. What of
it is BF16 its files say, for which torch is needed; without them, the lists of its config.

Refused: arguments out of range, and what ``models.py`` and ``gpus.py`` refuse. Not modelled: passes that mix prefill
and decode rows, that passes with more than 64 protected rows run without a graph, rates by linear rather than by layer,
which linears the last layer has in low precision (each counts by 1 / layers), blocks that are not fused, tile
quantisation at small M (below 512 rows the rates of 512 are carried on), more graphs and launches of low precision on a
slow host; uneven routers, shared experts beside the routed ones at the same time, the expansion of a cached latent
prefix, towers. Needs neither a GPU nor torch nor SGLang.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mixquant_sglang import recipe as recipes
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.plan import plot
from mixquant_sglang.tools.plan.advice import break_even, settled
from mixquant_sglang.tools.plan.gpus import GPUS, find_gpu
from mixquant_sglang.tools.plan.memory import memory_of
from mixquant_sglang.tools.plan.models import find_model, find_quantised
from mixquant_sglang.tools.plan.predict import BASELINE, predict
from mixquant_sglang.tools.plan.recipes import STOCK_BF16, STOCK_FP8, make_plan
from mixquant_sglang.tools.plan.table import as_json, as_table
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.weights.quantised_config import check_recipe

DEFAULT_RECIPES = ("bf16", "fp8", "nvfp4", "nvfp4-fp8", "nvfp4-fp8-down", "nvfp4-emulated", "nvfp4-everywhere")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mixquant plan``."""
    parser.add_argument("model", metavar="MODEL", help="a directory with a config.json, or a known name like Qwen3-8B")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(gpu.name for gpu in GPUS))
    parser.add_argument("--input-len", required=True, type=int, metavar="L", help="tokens of the prompt")
    parser.add_argument("--cached", type=int, default=0, metavar="C", help="of them in the radix cache (default 0)")
    parser.add_argument("--output-len", type=int, default=256, metavar="N", help="generated tokens (default 256)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="requests at once (default 1)")
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=None,
        metavar="NAME|FILE",
        help=f"default: {' '.join(DEFAULT_RECIPES)}; also {STOCK_BF16}, {STOCK_FP8}: SGLang's own servers",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="GPUS", help="tensor parallel size (default 1)")
    parser.add_argument("--ep", type=int, default=1, metavar="GPUS", help="of them, expert parallel size (default 1)")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help="--chunked-prefill-size (default: SGLang's choice)")
    parser.add_argument("--no-protect", action="store_true", help="as with 'protect: {last_prompt_token: false}'")
    parser.add_argument("--json", action="store_true", help="one JSON object, keyed by recipe")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="roofline and speed-up over length")


def run(args: argparse.Namespace) -> int:
    """Prints the table or the JSON; returns 0. MixQuantError, in one line, for whatever the user can mend."""
    gpu, model = find_gpu(args.gpu), find_model(args.model)
    names = list(dict.fromkeys(args.recipe or DEFAULT_RECIPES))
    if (found := find_quantised(args.model)) is not None:
        quantised, in_bf16 = found
        if any(b.experts and not in_bf16(f"{at}.{b.experts.name}", ()) for at, b in model.named()):
            raise MixQuantError(f"MODEL: {args.model}: experts of quantised checkpoints are not taken")
        model = replace(model, in_bf16=in_bf16)
        names = names if args.recipe else [quantised.recipe]
        for name in {*names} - {STOCK_BF16, STOCK_FP8}:
            check_recipe(recipes.load(name), quantised, args.model)
    work = Workload(args.input_len, args.cached, args.output_len, args.batch, args.tp, args.chunk, args.ep)
    protect = False if args.no_protect else None
    plans = [make_plan(name, model, gpu, work.tp, protect, work.ep) for name in names]
    baseline = make_plan(BASELINE, model, gpu, work.tp, ep=work.ep)
    low = [plan for plan in plans if any(one.prefill != one.decode for one in plan.placed) and plan.has_bf16]
    advice = {plan.recipe: break_even(plan, baseline, model, gpu, work.tp) for plan in low}
    plans = [settled(plan, advice.get(plan.recipe)) for plan in plans]
    predictions = [predict(plan, model, gpu, work) for plan in plans]
    if args.plot is not None:
        plot.save(args.plot, plans, predictions, model, gpu, work)
    memories = [memory_of(plan, model, gpu, work) for plan in plans]
    if args.json:
        print(as_json(predictions, memories, advice))
    else:
        print(as_table(predictions, memories, advice, model, gpu, work))
    return 0
