"""Processes in which SGLang loads no plugins: tokenizer workers (``--tokenizer-worker-num``) and Ray actors.

All that reaches them of the launcher is its ServerArgs, pickled, which each reads before it makes its tokenizer manager
or its scheduler.  So the arguments carry an object that loads the plugin where it is unpickled.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixquant_sglang import recipe
from mixquant_sglang.errors import refusing
from mixquant_sglang.host import sent
from mixquant_sglang.host.hooks import http, launcher, registry
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.recipe import Recipe
from mixquant_sglang.versions import machine
from mixquant_sglang.versions.dialect import dialect

# A Ray actor inherits nothing of the launcher.
_CARRIED = (*machine.TOLD, recipe.RECIPE_ENV, recipe.MIN_TOKENS_ENV, "SGLANG_PLUGINS")


class Arrival:
    """What the launcher sends along: the environment that says what was asked for, and the recipe that it read."""

    def __init__(self, environment: dict[str, str], wanted: Recipe) -> None:
        self.environment, self.wanted = environment, wanted

    def __reduce__(self) -> tuple[Callable[..., Arrival], tuple[dict[str, str], Recipe]]:
        return arrive, (self.environment, self.wanted)

    def __copy__(self) -> Arrival:  # neither goes to another process
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> Arrival:
        return self


@handler
def carry_plugin(_result: None, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    resolved, wanted = dialect().resolved(server_args), launcher.asked_recipe()
    asked = server_args.quantization == machine.NAME and os.environ.get(machine.ACTIVE_ENV) == "1"
    if not asked or wanted is None or not (resolved.tokenizer_worker_num > 1 or resolved.use_ray):
        return
    environment = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    name = recipe.requested()
    if name not in recipe.shipped():
        environment[recipe.RECIPE_ENV] = str(Path(name).absolute())  # a Ray actor has a directory of its own
    server_args._mixquant = Arrival(environment, wanted)


def arrive(environment: dict[str, str], wanted: Recipe) -> Arrival:
    """Makes this process one of the server that the launcher asked for; ends it with one line if that cannot be."""
    arrival = Arrival(environment, wanted)
    # multiprocessing is starting it, with the arguments of its function: SGLang loads plugins there where it needs them
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        return arrival
    from sglang.srt.plugins import load_plugins

    os.environ.update(environment)
    load_plugins()
    with refusing():
        machine.allow_cpu()
        for process in ("asked", "scheduler"):
            registry.set_hooks(process)
        launcher.register_config()
        launcher.asked.recipe, launcher.asked.arrived = wanted, True
        sent.keep(wanted)
        if launcher.HTTP_SERVER in sys.modules:
            http.add_layer()
    return arrival
