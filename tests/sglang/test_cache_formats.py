"""Formats of the KV cache, page sizes and attention back ends that a CPU can run: the checks of
``tests/e2e/test_cache_formats_on_gpu.py``, Triton's kernels in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts.models.make_family_models import make
from tests.support import caches, model_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NATIVE: dict[str, dict[str, Any]] = {
    "torch_native, pages of 1": {"page_size": 1},
    "torch_native, pages of 16": {"page_size": 16},
    "torch_native, fp8_e4m3": {"kv_cache_dtype": "fp8_e4m3"},
    "torch_native, fp8_e5m2": {"kv_cache_dtype": "fp8_e5m2"},
}
TRITON: dict[str, dict[str, Any]] = {
    "triton": {"attention_backend": "triton"},
    "triton, pages of 16": {"attention_backend": "triton", "page_size": 16},
}


@pytest.fixture(scope="module")
def ran(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("caches")
    out: dict[str, dict[str, Any]] = {}
    small = make(folder, "qwen3")  # two layers: the interpreter is slow
    for args, model, env in ((NATIVE, tiny_model, {}), (TRITON, small, {"TRITON_INTERPRET": "1"})):
        cases = {(name, kind): case for name in args for kind, case in caches.cases(str(model), args[name]).items()}
        results = model_runs.run([*cases.values()], folder, model_runs.CPU | env, 300)
        for (name, kind), result in zip(cases, results, strict=True):
            out.setdefault(name, {})[kind] = result
    return out


@pytest.mark.parametrize("name", [*NATIVE, *TRITON])
def test_cache(name: str, ran: dict[str, dict[str, Any]]) -> None:
    assert not caches.problems(ran[name])
    assert "bits" in ran[name]["stock"], caches.ended(ran[name]["stock"])
