"""``mixquant doctor [COMMAND]``: versions, GPU, hooks and recipes; what a server would say here, with none started.

With a launch command: whether it starts, or all that would end it (``launch.py``).  With ``--report``: what a bug
report needs (``report.py``).
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import TYPE_CHECKING

from mixquant_sglang import __version__, recipe
from mixquant_sglang.errors import MixQuantError

if TYPE_CHECKING:
    from mixquant_sglang.recipe.select import Device

_W4A16 = "SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16"
_PACKAGES = ("sglang", "torch", "triton", "sglang-kernel", "flashinfer-python", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``mixquant doctor``."""
    parser.usage = "mixquant doctor [-h] [--recipe NAME|FILE] [--report] [LAUNCH COMMAND OR FLAGS ...]"
    parser.add_argument("--recipe", default=None, metavar="NAME|FILE", help="look at this recipe alone")
    parser.add_argument("--report", action="store_true", help="print what a bug report needs: no paths, keys or hosts")
    parser.epilog = "What follows these options is SGLang's: a launch command, or its flags alone."


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the launch command behind them."""
    end = 1
    while end < len(argv):
        if argv[end] == "--recipe":
            end += 2
        elif argv[end] in ("--report", "-h", "--help") or argv[end].startswith("--recipe="):
            end += 1
        else:
            break
    return [*argv[:end]], [*argv[end:]][1 if argv[end : end + 1] == ["--"] else 0 :]


def run(args: argparse.Namespace) -> int:
    """Prints what a server would be, and do, here; returns 0 if it would start, else 1."""
    if args.report:
        from mixquant_sglang.tools import report

        return report.run(args.recipe, args.launch)
    if args.launch:
        return _launch(args.recipe, args.launch)
    if not _packages():
        print("=> SGLang is not installed: pip install mixquant-sglang brings it")
        return 1
    healthy = _plugin()
    from mixquant_sglang.versions import machine

    device = machine.device()
    if warning := machine.untested(device):
        print(f"                   {warning}")
    healthy = _hooks() and healthy
    print(f"device             {device}")
    healthy = _recipes(args.recipe, device) and healthy
    print(f"=> --quantization mixquant {'will start here' if healthy else 'will NOT start here'}")
    return 0 if healthy else 1


def _launch(wanted: str | None, words: Sequence[str]) -> int:
    """Prints whether the launch command starts here, and all that would end it."""
    from mixquant_sglang.tools import launch

    command = launch.Command(words)
    if wanted is not None:
        command.environment[recipe.RECIPE_ENV] = wanted
    lines = launch.ends(command)
    for note in command.notes:
        print(f"note: {note}")
    for line in lines:
        print(f"ends: {line}")
    some = "1 line" if len(lines) == 1 else f"{len(lines)} lines"
    print(f"=> it will NOT start here: {some}" if lines else "=> it will start here")
    return 1 if lines else 0


def _packages() -> bool:
    """Whether SGLang and torch are installed."""
    healthy = True
    print(f"mixquant           {__version__}, Python {platform.python_version()}")
    for package in _PACKAGES:
        try:
            print(f"{package:<18} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:<18} not installed")
            healthy = healthy and package not in ("sglang", "torch")
    return healthy


def _plugin() -> bool:
    """Whether SGLang finds the package, and loads it."""
    registered = any(entry.name == "mixquant" for entry in entry_points(group="sglang.srt.plugins"))
    allowed = os.environ.get("SGLANG_PLUGINS")
    blocked = bool(allowed) and "mixquant" not in [name.strip() for name in (allowed or "").split(",")]
    print(f"plugin             {'found by SGLang' if registered else 'NOT FOUND: reinstall the package'}", end="")
    print(", but SGLANG_PLUGINS leaves it out" if blocked else "")
    return registered and not blocked


def _hooks() -> bool:
    """Whether this SGLang has all that hooks go to."""
    from mixquant_sglang.host.hooks import registry

    missing, hooks = 0, registry.hooks_of()
    for hook in hooks:
        try:
            registry.target_of(hook)
        except MixQuantError as error:
            missing += 1
            print(f"hook {hook.handler}: {error}")
    print(f"hooks              {len(hooks) - missing} of {len(hooks)} targets exist")
    return not missing


def _recipes(only: str | None, device: Device) -> bool:
    """Whether a server would take the recipe that is asked for."""
    healthy = True
    asked = only or recipe.requested()
    by = "" if only else " (MIXQUANT_RECIPE)" if os.environ.get(recipe.RECIPE_ENV) else " (the default)"
    for name in [only] if only else dict.fromkeys([*recipe.shipped(), asked]):
        try:
            print(f"recipe {name:<17} {_comes_to(name, device)}")
        except MixQuantError as error:
            print(f"recipe {name:<17} refused: {error}")
            healthy = healthy and name != asked
    print(f"asked for          {asked}{by}")
    return healthy


def _comes_to(name: str, device: Device) -> str:
    """What a server with this recipe would say here; raises what it would end with before it looks at a model."""
    from mixquant_sglang.host import refusals
    from mixquant_sglang.recipe.select import select

    loaded = recipe.load_requested(name)
    selection = select(loaded, device)
    refusals.check_recipe(loaded, selection)
    if selection.kernels.get("nvfp4") == "native" and os.environ.get(_W4A16, "").lower() in ("1", "true", "yes", "y"):
        raise MixQuantError(f"{_W4A16} leaves activations in BF16; unset it for native nvfp4")
    return f"{selection.describe()}; because {selection.reason}"
