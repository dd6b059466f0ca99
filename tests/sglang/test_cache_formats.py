"""Formats of the KV cache that a CPU can run: the checks of ``tests/e2e/test_cache_formats_on_gpu.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import caches, model_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FORMATS = ("fp8_e4m3", "fp8_e5m2")


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    cases = {
        (name, kind): case
        for name in FORMATS
        for kind, case in caches.cases(str(tiny_model), {"kv_cache_dtype": name}).items()
    }
    out: dict[str, dict[str, Any]] = {}
    told: dict[int, dict[str, Any]] = {}
    folder = tmp_path_factory.mktemp("caches")
    results = model_runs.run(
        [*cases.values()], folder, model_runs.CPU, 900, said=told.__setitem__, at_once=len(FORMATS)
    )
    assert [told[number] for number in range(len(cases))] == results
    for (name, kind), result in zip(cases, results, strict=True):
        out.setdefault(name, {})[kind] = result
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_cache(name: str, ran: dict[str, dict[str, Any]]) -> None:
    assert not caches.problems(ran[name])
    assert "bits" in ran[name]["stock"], caches.ended(ran[name]["stock"])
