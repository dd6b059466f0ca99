"""``mixquant sensitivity MODEL --data FILE``: which layers to keep in BF16, by what each does to the logits.

Each group (the linears that SGLang fuses into one GEMM, or all experts of a layer) runs in low precision alone; kl.py
measures what that does to the predictions, and ``mixquant plan``'s roofline says how many milliseconds of prefill it
gains:

    worth of a group in BF16 = KL of the answer / milliseconds that it gains in low precision

``--budget 5%`` may give back 5% of the milliseconds that all groups with a gain save together; the groups of largest
worth that still fit are kept in BF16. Groups that gain nothing are kept in any case, for they cost nothing.

The KL of the *answer* decides; that of the prompt's own rows is only shown. Nothing is sampled from a prompt's rows: in
the last layer, say, all but their keys and values is low precision without any effect on a generated token.

KL does not add up over groups, so the chosen recipe is run as a whole, and so is the full one; where the chosen one
does more to the answers than the full one, its comments and stderr say so. KL is measured in emulation, and taken for
noise as far as BF16's rounding alone explains it; times are predicted. Groups are packed one at a time, and together
only for those two runs.

Refused (MixQuantError): checkpoints that are quantised already, recipes that decode in low precision, use ready-made
weights or gain nothing on the GPU, and what ``mixquant plan`` and kl.py refuse.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from mixquant_sglang import recipe as recipes
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe import show
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.plan.gpus import find_gpu
from mixquant_sglang.tools.plan.models import find_model
from mixquant_sglang.tools.progress import Bar
from mixquant_sglang.tools.quantize.calibration import read_samples
from mixquant_sglang.tools.quantize.targets import refuse_quantised
from mixquant_sglang.tools.sensitivity.choice import Measured, Prices, Result, Run, choose, floor_of, groups_of
from mixquant_sglang.tools.sensitivity.kl import Measurement
from mixquant_sglang.tools.sensitivity.report import WORSE, as_json, as_yaml, comments
from mixquant_sglang.weights.checkpoint import Source

DEFAULT_GPU = "H200"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mixquant sensitivity``."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder with a BF16 checkpoint in safetensors")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='lines of {"text": ...} or {"messages": [...]}, as for `quantize`; best, conversations with answers',
    )
    parser.add_argument("--recipe", default=recipes.DEFAULT, metavar="NAME|FILE", help="to begin with (default: auto)")
    parser.add_argument("--budget", default="5%", metavar="P%", help="of the gain to give back (default: 5%%)")
    parser.add_argument("--gpu", metavar="NAME", help=f"to serve on (default: the one present, else {DEFAULT_GPU})")
    parser.add_argument("--input-len", type=int, default=8192, metavar="L", help="prompt to price (default: 8192)")
    parser.add_argument(
        "--priced-as", metavar="MODEL", help="take layer sizes for prices from this model, as in `plan`"
    )
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="lines to read (default: 32)")
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="of each sample (default: 2048)")
    parser.add_argument(
        "--answer-tokens",
        type=int,
        default=32,
        metavar="N",
        help="rows at the end of each sample that play the last prompt token and the answer, in BF16 (default: 32; 1: "
        "the first generated token alone)",
    )
    parser.add_argument(
        "--compute",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what all but the packed copies is computed in (default: float32; bfloat16 takes half the memory, and its "
        "rounding hides what FP8 does to one linear)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cuda if there, else cpu)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the recipe here too")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")


def run(args: argparse.Namespace) -> int:
    """Prints a recipe whose comments are the evidence; returns 0. MixQuantError for whatever the user can mend."""
    result = measure(args)
    text = comments(result) + as_yaml(result)
    if args.out is not None:
        try:
            args.out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise MixQuantError(f"--out: {args.out}: cannot be written: {error.strerror}") from error
    print(text, end="")
    if result.worse:
        print(WORSE, file=sys.stderr)
    if args.json:
        print(as_json(result))
    return 0


def measure(args: argparse.Namespace) -> Result:
    budget = _budget(args.budget)
    for option, least in (("samples", 1), ("max_tokens", 2), ("answer_tokens", 1)):
        if getattr(args, option) < least:
            raise MixQuantError(
                f"--{option.replace('_', '-')}: {getattr(args, option)} is too small; allowed: at least {least}"
            )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise MixQuantError("--device cuda: this machine has no CUDA device that torch can use; use --device cpu")
    if args.out is not None and not args.out.parent.is_dir():
        raise MixQuantError(f"--out: {args.out.parent}: no such folder")
    recipe, gpu = recipes.load(args.recipe), find_gpu(args.gpu or _gpu_here())
    refuse_quantised(Source.open(args.model))
    model = find_model(str(args.model))
    selection = select(recipe, Device(gpu.name, gpu.capability))
    groups = groups_of(recipe, selection, model)
    priced = model
    if args.priced_as:
        priced = find_model(args.priced_as)
        last = priced.blocks[-1:] * (model.layers - priced.layers)
        priced = replace(priced, blocks=(*priced.blocks[: model.layers], *last))
    prices = Prices(priced, gpu, recipe, selection, args.input_len)
    gains = {group: prices.gain(group) for group in groups}
    gain_ms = math.fsum(max(gain, 0.0) for gain in gains.values())
    if not gain_ms:
        raise MixQuantError(
            f"recipe {recipe.name} ({selection.describe()}) is predicted to gain nothing on {gpu.name} with "
            f"{priced.name} at {args.input_len} tokens, so there is no speed to trade; name the --gpu that will serve, "
            "a longer --input-len or, for a small stand-in, the model that it stands for with --priced-as"
        )
    try:
        samples = read_samples(args.data)[: args.samples]
    except (OSError, UnicodeDecodeError) as error:
        raise MixQuantError(f"--data: {args.data}: cannot be read: {error}") from error

    with (
        refusing_memory(args.compute),
        Bar(total=len(samples) * (len(groups) + 5), desc="sensitivity", unit="pass") as bar,
    ):
        measurement = Measurement(
            args.model,
            samples,
            groups,
            scales=recipe.scales,
            device=device,
            max_tokens=args.max_tokens,
            answer_tokens=args.answer_tokens,
            protect=recipe.protect_last_prompt_token,
            tail=recipe.protected_tail,
            dtype=getattr(torch, args.compute),
            tick=bar.update,
        )
        kls = {"bf16": measurement.kl({})}
        found = tuple(Measured(g, measurement.kl({g: measurement.pack(g)}), gains[g]) for g in groups)
        noise = measurement.rounding(groups)
        kept = choose(found, budget * gain_ms, floor_of(noise, len(groups), args.compute))
        packed = {group: measurement.pack(group) for group in groups}
        kls["recipe"] = measurement.kl(packed)
        kls["result"] = measurement.kl({group: copy for group, copy in packed.items() if group.name not in kept})
    bf16 = {"bf16": groups, "recipe": [], "result": [group for group in groups if group.name in kept]}
    return Result(
        recipe=recipe,
        prefill=selection.prefill,
        model=model.name,
        gpu=gpu.name,
        input_len=args.input_len,
        budget=budget,
        tokens=measurement.tokens,
        groups=found,
        kept=kept,
        gain_ms=gain_ms,
        given_back_ms=math.fsum(max(one.gain_ms, 0.0) for one in found if one.group.name in kept),
        runs={name: Run(kls[name], *prices.speed(groups, bf16[name])) for name in kls},
        noise=noise,
        compute=args.compute,
    )


@contextmanager
def refusing_memory(compute: str) -> Iterator[None]:
    """Where the model does not fit the GPU, what to do instead."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        less = "--compute bfloat16 takes half of it" if compute == "float32" else "fewer --max-tokens take less"
        raise MixQuantError(
            f"the GPU has too little memory for the model in {compute}; {less}, --device cpu none"
        ) from error


def _budget(text: str) -> float:
    number = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", text.strip())
    if not number or float(number[1]) > 100:
        raise MixQuantError(f"--budget: {show(text)} is no share of the gain; allowed: 0% to 100%, like 5%")
    return float(number[1]) / 100


def _gpu_here() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else DEFAULT_GPU
