"""``scripts/drift`` reads SGLang's source as Python would import it."""

from __future__ import annotations

from importlib.metadata import files
from pathlib import Path

import pytest

from mixquant_sglang.host.hooks import registry, table


@pytest.mark.slow
def test_what_is_there_and_what_is_not() -> None:
    from scripts.tools import drift

    init = next(file for file in files("sglang") or [] if str(file) == "sglang/__init__.py")
    site = Path(str(init.locate())).parents[1]
    targets = [target for hook in table.HOOKS if hook.process != "http" for target in hook.targets]
    assert [drift.exists(site, target) for target in targets] == [_imports(target) for target in targets]
    assert all(drift.exists(site, target) for hook in registry.hooks_of("http") for target in hook.targets)
    for gone in ("sglang.srt.server_args.ServerArgs.nope", "sglang.srt.nope.X.y", "sglang.srt.server_args.nope"):
        assert not drift.exists(site, gone)


def _imports(target: str) -> bool:
    import pkgutil

    owner, _, name = target.rpartition(".")
    try:
        return hasattr(pkgutil.resolve_name(owner), name)
    except (ImportError, AttributeError):
        return False
