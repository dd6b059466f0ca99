"""``mixquant`` and ``python -m mixquant_sglang``: what will happen on this machine and why, with no server started."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING

from mixquant_sglang import __version__, recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.plan import command as planner

if TYPE_CHECKING:
    from mixquant_sglang.recipe.select import Device

_W4A16 = "SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16"
_PACKAGES = ("sglang", "torch", "triton", "sglang-kernel", "flashinfer-python", "transformers")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status (0 fine, 1 a server would not start here, 2 wrong usage)."""
    parser = argparse.ArgumentParser(prog="mixquant", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mixquant {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="versions, GPU, hooks, kernels: what will happen here and why")
    doctor.add_argument("--recipe", default=None, metavar="NAME|FILE", help="look at this recipe alone")
    commands.add_parser("recipes", help="the shipped recipes")
    quantize = commands.add_parser("quantize", help="write an NVFP4 checkpoint (compressed-tensors) of a BF16 one")
    sensitivity = commands.add_parser("sensitivity", help="which layers to keep in BF16, measured; prints a recipe")
    planner.add_arguments(commands.add_parser("plan", help="predict times, gain and memory of a model on a GPU"))
    # these two bring torch, which the other commands do without
    asked = (argv if argv is not None else sys.argv[1:])[:1]
    if asked == ["quantize"]:
        from mixquant_sglang.tools.quantize import command as checkpoint

        checkpoint.add_arguments(quantize)
    if asked == ["sensitivity"]:
        from mixquant_sglang.tools.sensitivity import measure as measuring

        measuring.add_arguments(sensitivity)
    args = parser.parse_args(argv)
    try:
        if args.command == "quantize":
            return checkpoint.run(args)
        if args.command == "sensitivity":
            return measuring.run(args)
        if args.command == "plan":
            return planner.run(args)
        return _doctor(args.recipe) if args.command == "doctor" else _recipes()
    except MixQuantError as error:
        print(f"mixquant: {error}", file=sys.stderr)
        return 1


def _recipes() -> int:
    for name in recipe.shipped():
        print(f"{name:<18} {recipe.load(name).description}")
    return 0


def _comes_to(name: str, device: Device) -> str:
    """What a server with this recipe would say here; raises what it would end with before it looks at a model."""
    from mixquant_sglang.host import refusals
    from mixquant_sglang.recipe.select import select

    loaded = recipe.load(name)
    selection = select(loaded, device)
    refusals.check_recipe(loaded, selection)
    if selection.kernels.get("nvfp4") == "native" and os.environ.get(_W4A16, "").lower() in ("1", "true", "yes", "y"):
        raise MixQuantError(f"{_W4A16} leaves activations in BF16; unset it for native nvfp4")
    return f"{selection.describe()}; because {selection.reason}"


def _doctor(only: str | None) -> int:
    """Imports SGLang and torch, but starts nothing and changes nothing."""
    healthy = True
    print(f"mixquant           {__version__}, Python {platform.python_version()}")
    for package in _PACKAGES:
        try:
            print(f"{package:<18} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:<18} not installed")
            healthy = healthy and package not in ("sglang", "torch")
    if not healthy:
        print("=> SGLang is not installed: pip install mixquant-sglang brings it")
        return 1

    registered = any(entry.name == "mixquant" for entry in entry_points(group="sglang.srt.plugins"))
    allowed = os.environ.get("SGLANG_PLUGINS")
    blocked = bool(allowed) and "mixquant" not in [name.strip() for name in (allowed or "").split(",")]
    print(f"plugin             {'found by SGLang' if registered else 'NOT FOUND: reinstall the package'}", end="")
    print(", but SGLANG_PLUGINS leaves it out" if blocked else "")
    healthy = registered and not blocked

    from mixquant_sglang.host.hooks import table
    from mixquant_sglang.versions import machine

    device = machine.device()
    if warning := machine.untested(device):
        print(f"                   {warning}")
    missing, hooks = 0, table.hooks_of()
    for hook in hooks:
        try:
            table.target_of(hook)
        except MixQuantError as error:
            missing += 1
            print(f"hook {hook.handler}: {error}")
    print(f"hooks              {len(hooks) - missing} of {len(hooks)} targets exist")
    healthy = healthy and not missing

    print(f"device             {device}")
    asked = only or recipe.requested()
    by = "" if only else " (MIXQUANT_RECIPE)" if os.environ.get(recipe.RECIPE_ENV) else " (the default)"
    for name in [only] if only else dict.fromkeys([*recipe.shipped(), asked]):
        try:
            print(f"recipe {name:<17} {_comes_to(name, device)}")
        except MixQuantError as error:
            print(f"recipe {name:<17} refused: {error}")
            healthy = healthy and name != asked
    print(f"asked for          {asked}{by}")
    print(f"=> --quantization mixquant {'will start here' if healthy else 'will NOT start here'}")
    return 0 if healthy else 1
