"""Sets the hooks of ``table.py``, and proves that each took effect."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from mixquant_sglang import __version__
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.hooks.hook import Hook
from mixquant_sglang.host.hooks.table import HOOKS
from mixquant_sglang.versions import machine

_handlers: dict[str, Callable[..., Any]] = {}


def target_of(hook: Hook) -> str:
    """The dotted name that ``hook`` takes in this SGLang; raises ``MixQuantError`` if it has none of them."""
    for target in hook.targets:
        owner, _, attribute = target.rpartition(".")
        try:
            found = hasattr(pkgutil.resolve_name(owner), attribute)
        except (ImportError, AttributeError):
            found = False
        # object.__init__ and the like do not count, and a class must define what we replace.
        if found:
            return target
    raise MixQuantError(
        f"SGLang {machine.sglang_version()} has no {' nor '.join(hook.targets)}, which mixquant {__version__} needs: "
        f"it {hook.why}. Tested with SGLang {' and '.join(machine.TESTED)}: "
        f"pip install 'sglang=={[*machine.TESTED][-1]}'"
    )


def hooks_of(*processes: str) -> list[Hook]:
    """The hooks of these processes (of all, if none is named) that this SGLang has something to hook for."""
    return [hook for hook in HOOKS if (not processes or hook.process in processes) and hook.needed]


def register_hooks(hooks: list[Hook]) -> None:
    """Registers them with SGLang's HookRegistry, which applies them when all plugins have run."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(target_of(hook), handler_of(hook), HookType(hook.kind))


def set_hooks(process: str) -> None:
    """Sets and proves those of ``process`` that are not in place."""
    register_hooks([hook for hook in hooks_of(process) if not took_effect(hook)])
    apply_hooks()
    check_hooks_took_effect(process)


def apply_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()


def handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function as the handler of the hook of its name."""
    _handlers[function.__name__] = function
    return function


def handler_of(hook: Hook) -> Callable[..., Any]:
    return _handlers[hook.handler]


def took_effect(hook: Hook) -> bool:
    """Whether calling the target calls our handler: SGLang only logs a hook that it could not apply."""
    function: Any = pkgutil.resolve_name(target_of(hook))
    ours = _handlers.get(hook.handler)
    while ours is not None and function is not None:
        function = getattr(function, "__func__", function)
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is ours for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def check_hooks_took_effect(*processes: str) -> None:
    """Raises ``MixQuantError`` for a hook that is missing in this process (by default: one that serves a model)."""
    for hook in hooks_of(*(processes or ("scheduler",))):
        if not took_effect(hook):
            raise MixQuantError(
                f"the hook on {target_of(hook)} is not in place, so mixquant cannot do its work ({hook.why}). "
                f"Start SGLang with --quantization {machine.NAME} and with the plugin loaded "
                "(SGLANG_PLUGINS, if set, must contain mixquant; a json override of the model config is not enough)"
            )
