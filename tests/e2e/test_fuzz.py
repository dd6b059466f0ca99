"""``scripts/fuzz``, briefly, on the servers that are up: the long run is by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.servers import Servers

pytestmark = [pytest.mark.server, pytest.mark.timeout(2400)]

# steps of each part; always the same seeds
STEPS = {"recipes": 400, "headers": 100, "policies": 40, "bodies": 10, "namespaces": 20, "updates": 12}


def test_everything_has_its_one_right_answer(servers: Servers, tiny_model: Path) -> None:
    from scripts.tools import fuzz

    seen: dict[str, int] = {}
    for part, steps in STEPS.items():
        ran = fuzz.run(servers.low.url, tiny_model, servers.stock.url, seconds=600, seed=2026, steps=steps, only=[part])
        assert ran["steps"] == steps
        seen |= ran["seen"]
    print(seen)
    assert any(name.startswith("policies: refused") for name in seen)
    assert any(name.startswith("policies: bf16") for name in seen) and "policies: low" in seen
