"""``scripts/fuzz.py``, briefly, on the servers that are up: the long run is by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.servers import Servers

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_everything_has_its_one_right_answer(
    servers: Servers, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import fuzz

    seen = fuzz.run(servers.low.url, tiny_model, servers.stock.url, seconds=40, seed=2026)["seen"]
    print(seen)
    parts = {name.partition(":")[0] for name in seen}
    assert parts == {"recipes", "headers", "policies", "bodies", "namespaces", "updates"}
    assert any(name.startswith("policies: refused") for name in seen)
    assert any(name.startswith("policies: bf16") for name in seen) and "policies: low" in seen
