"""Formats of the KV cache, page sizes and attention back ends on a GPU, on SGLang's own model runner.

With the same flags recipe bf16 is stock SGLang to the last bit, a request's BF16 prefill is stock's, and the default
recipe counts its rows exactly.  What stock SGLang itself does not run here, it must not run with mixquant either; what
it has to run is in ``RUN``.  A table at the end says what was seen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang.versions import machine
from tests.support import caches, model_runs

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]

AT_ONCE = min(6, (os.cpu_count() or 1) // 4 or 1)  # processes that share the GPU
ARGS: dict[str, Any] = {"sampling_backend": "pytorch", "max_total_tokens": 8192, "chunked_prefill_size": 2048}
FP4 = ("nvfp4", "fp4_mx_block16") + (("fp4_e2m1",) if machine.sglang_version() == "0.5.17" else ())
# what stock SGLang runs on any GPU from SM80 (FP8 formats: SM89)
RUN: dict[str, dict[str, Any]] = {
    "triton": {"attention_backend": "triton"},
    "triton, pages of 16": {"attention_backend": "triton", "page_size": 16},
    "triton, fp8_e4m3": {"attention_backend": "triton", "kv_cache_dtype": "fp8_e4m3"},
    "triton, fp8_e5m2": {"attention_backend": "triton", "kv_cache_dtype": "fp8_e5m2"},
    "flashinfer": {"attention_backend": "flashinfer"},
    "flashinfer, pages of 16": {"attention_backend": "flashinfer", "page_size": 16},
    "flashinfer, fp8_e4m3": {"attention_backend": "flashinfer", "kv_cache_dtype": "fp8_e4m3"},
    "torch_native": {"attention_backend": "torch_native"},
}
# what it runs on some
TRY: dict[str, dict[str, Any]] = {
    "fa3": {"attention_backend": "fa3"},
    "fa3, pages of 64": {"attention_backend": "fa3", "page_size": 64},
    "fa3, fp8_e4m3": {"attention_backend": "fa3", "kv_cache_dtype": "fp8_e4m3"},
    "flashinfer, fp8_e5m2": {"attention_backend": "flashinfer", "kv_cache_dtype": "fp8_e5m2"},
    "torch_native, fp8_e5m2": {"attention_backend": "torch_native", "kv_cache_dtype": "fp8_e5m2"},
    **{
        f"{backend}, {dtype}": {"attention_backend": backend, "kv_cache_dtype": dtype}
        for backend in ("triton", "flashinfer", "trtllm_mha")
        for dtype in FP4
    },
}
NAMES = [*RUN, *TRY]


@pytest.fixture(scope="module")
def ran(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    args = RUN | TRY
    cases = {
        (name, kind): case for name in NAMES for kind, case in caches.cases(str(tiny_model), ARGS | args[name]).items()
    }
    env = {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    folder = tmp_path_factory.mktemp("caches")
    out: dict[str, dict[str, Any]] = {}
    results = model_runs.run([*cases.values()], folder, env, 600, said=model_runs.told([*cases]), at_once=AT_ONCE)
    for (name, kind), result in zip(cases, results, strict=True):
        out.setdefault(name, {})[kind] = result
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{_table(out)}")
    return out


def _table(ran: dict[str, dict[str, Any]]) -> str:
    rows = [("cache", "bf16 == stock", "bf16 prefill == stock", "rows of prefill", "ended")]
    for name, results in ran.items():
        stock, control, auto = (results[kind] for kind in caches.KINDS)
        bits = stock.get("bits")
        rows.append(
            (
                name,
                str(bits == control.get("bits")) if bits else "-",
                str(bits == auto["policy"]["bits"]) if bits and "policy" in auto else "-",
                str(auto["after"]["tokens"]["prefill"]) if "after" in auto else "-",
                "; ".join(f"{kind}: {why[:160]}" for kind, result in results.items() if (why := caches.ended(result))),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_cache(name: str, ran: dict[str, dict[str, Any]]) -> None:
    assert not caches.problems(ran[name])
    if name in RUN:
        assert "bits" in ran[name]["stock"], caches.ended(ran[name]["stock"])
