"""Every family of models on SGLang's own model runner on a GPU: the checks of ``tests/sglang/test_families.py``.

Some processes run them all; a family that ends one fails alone.  A table at the end says what was seen.  By hand:
``FAMILIES=qwen3_5,gemma4`` runs these alone, ``FAMILY_GRAPHS=1`` has SGLang capture graphs of decode, and of prefill
where its own rules do; a family that stock SGLang does not capture must end with mixquant too.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.recipe.select import select
from mixquant_sglang.versions import machine
from tests.support import families, model_runs
from tests.support.commands import command_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = families.chosen()
AT_ONCE = min(6, (os.cpu_count() or 1) // 4 or 1)  # processes that share the GPU
ARGS: dict[str, Any] = {"sampling_backend": "pytorch", "max_total_tokens": 8192, "chunked_prefill_size": 2048}
WITH_GRAPHS = os.environ.get("FAMILY_GRAPHS") == "1"
GRAPHS: dict[str, Any] = {
    "disable_cuda_graph": False,
    "cuda_graph_bs_prefill": [16, 64, 256],
    "cuda_graph_max_bs_decode": 2,
}
COLUMNS = ("family", "bf16 == stock", "bf16 prefill == stock", "low linears", "experts", "tokens", "protected", "error")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families")
    made = subprocess.run(
        [*command_of("make_family_models"), folder, *NAMES], capture_output=True, text=True, timeout=600, check=False
    )
    assert made.returncode == 0, made.stderr[-3000:]
    args = ARGS | (GRAPHS if WITH_GRAPHS else {})
    out: dict[str, dict[str, Any]] = {}
    env = {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    # A capture that was broken off leaves a process in which no other ends: each family has one of its own.
    for names in [[name] for name in NAMES] if WITH_GRAPHS else [NAMES]:
        cases = {
            (name, kind): case
            for name in names
            for kind, case in families.cases(name, str(folder / name), {"survive": not WITH_GRAPHS}, args).items()
        }
        results = model_runs.run([*cases.values()], folder, env, 600, said=model_runs.told([*cases]), at_once=AT_ONCE)
        for (name, kind), result in zip(cases, results, strict=True):
            out.setdefault(name, {})[kind] = result
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{_table(out)}")
    return out


def _table(ran: dict[str, dict[str, Any]]) -> str:
    rows = [COLUMNS]
    for name, results in ran.items():
        stock, control, auto = (results[kind] for kind in ("stock", "bf16", "auto"))
        errors = {kind: result.get("error") or result.get("refused") for kind, result in results.items()}
        error = next((f"{kind}: {why}" for kind, why in errors.items() if why), "").replace("\n", " ")
        state, after = auto.get("state") or {}, auto.get("after") or {}
        linears = {precision: sum(names.values()) for precision, names in auto.get("low", {}).items()}
        policy = auto.get("policy", {}).get("bits")
        rows.append(
            (
                name,
                str("bits" in stock and stock["bits"] == control.get("bits")),
                str(policy == stock.get("bits")) if policy else "-",
                _counts(linears),
                _counts(state.get("experts", {})),
                "; ".join(f"{phase} {_counts(counts)}" for phase, counts in after.get("tokens", {}).items()),
                str(after.get("protected_rows", "-")),
                error[:200],
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "-"


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str, ran: dict[str, dict[str, Any]]) -> None:
    best = select(recipe.load("auto"), machine.device()).prefill
    ends = {kind: str(result.get("error") or result.get("refused") or "") for kind, result in ran[name].items()}
    if WITH_GRAPHS and ends["stock"]:
        assert all(ends.values()), ends
        pytest.skip(f"stock SGLang does not capture it: {ends['stock'][-200:]}")
    problems = families.problems(name, ran[name], attention="fp8", others=best, cuda=True)
    for kind, result in ran[name].items():
        if problems and "trace" in result:
            print(f"{kind}:\n{result['trace']}")
    assert not problems
