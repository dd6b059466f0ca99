"""``mixquant doctor``: versions, GPU, hooks and recipes; what a server would say here, with none started.

Imports SGLang and torch, but changes nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
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
    parser.add_argument("--recipe", default=None, metavar="NAME|FILE", help="look at this recipe alone")


def run(args: argparse.Namespace) -> int:
    """Prints what a server would be, and do, here; returns 0 if it would start, else 1."""
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

    loaded = recipe.load(name)
    selection = select(loaded, device)
    refusals.check_recipe(loaded, selection)
    if selection.kernels.get("nvfp4") == "native" and os.environ.get(_W4A16, "").lower() in ("1", "true", "yes", "y"):
        raise MixQuantError(f"{_W4A16} leaves activations in BF16; unset it for native nvfp4")
    return f"{selection.describe()}; because {selection.reason}"
