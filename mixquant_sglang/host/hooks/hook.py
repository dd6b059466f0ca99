"""What a hook is; ``table.py`` has ours."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Hook:
    """``handler`` names a function of this package.  ``process``: "launcher" hooks are set in every process that
    may parse server arguments, "asked" hooks once it asked for mixquant, "http" hooks there too if it will serve HTTP,
    "scheduler" hooks in the schedulers.  ``only_with``: a dotted name; an SGLang without it has nothing to hook, one
    with it must have a target."""

    handler: str
    kind: str
    process: str
    targets: tuple[str, ...]
    why: str
    only_with: str = ""

    @property
    def needed(self) -> bool:
        return not self.only_with or _exists(self.only_with)


def _exists(name: str) -> bool:
    """Whether there is such a module, which is not imported, or such a name in one."""
    try:
        if find_spec(name) is not None:
            return True
    except ModuleNotFoundError:  # a package that it would be in
        pass
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
