"""``mixquant`` and ``python -m mixquant_sglang``: what will happen on this machine and why, with no server started."""

from __future__ import annotations

import argparse
import sys

from mixquant_sglang import __version__, recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools import doctor
from mixquant_sglang.tools.plan import command as plan


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status (0 fine, 1 a server would not start here, 2 wrong usage)."""
    parser = argparse.ArgumentParser(prog="mixquant", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mixquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = commands.add_parser
    doctor.add_arguments(add("doctor", help="versions, GPU, hooks, kernels: what will happen here and why"))
    add("recipes", help="the shipped recipes")
    quantize_parser = add("quantize", help="write an NVFP4 checkpoint (compressed-tensors) of a BF16 one")
    sensitivity_parser = add("sensitivity", help="which layers to keep in BF16, measured; prints a recipe")
    plan.add_arguments(add("plan", help="predict times, gain and memory of a model on a GPU"))
    run = {"doctor": doctor.run, "recipes": _recipes, "plan": plan.run}
    argv = argv if argv is not None else sys.argv[1:]
    launch: list[str] = []
    if argv[:1] == ["doctor"]:  # what follows its own options is SGLang's
        argv, launch = doctor.split(argv)
    # these two bring torch, which the other commands do without
    asked = argv[:1]
    if asked == ["quantize"]:
        from mixquant_sglang.tools.quantize import command as quantize

        quantize.add_arguments(quantize_parser)
        run["quantize"] = quantize.run
    if asked == ["sensitivity"]:
        from mixquant_sglang.tools.sensitivity import measure as sensitivity

        sensitivity.add_arguments(sensitivity_parser)
        run["sensitivity"] = sensitivity.run
    args = parser.parse_args(argv)
    args.launch = launch
    try:
        return run[args.command](args)
    except MixQuantError as error:
        print(f"mixquant: {error}", file=sys.stderr)
        return 1


def _recipes(_: argparse.Namespace) -> int:
    for name in recipe.shipped():
        print(f"{name:<18} {recipe.load(name).description}")
    return 0
