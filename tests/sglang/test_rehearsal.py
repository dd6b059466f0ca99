"""A first run on a Blackwell GPU, rehearsed on the CPU (``tests/support/rehearsal.py`` says what stands for what)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rehearsal import BUCKETS, LAYERS, SCENARIOS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NAMES = [scenario.name for scenario in SCENARIOS]
OURS = [name for name in NAMES if name != "stock"]
PASSES = [f"{name}, {rows}" for rows in (*BUCKETS, 64) for name in ("prompts", "middle chunk", "asked for bf16")]
MIN_TOKENS = 13
MLP = {"512x128", "128x256"}  # [N, K]; every recipe has them in nvfp4
HAS_DUAL_GEMM = find_spec("sglang.srt.layers.dual_gemm") is not None


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play(tmp_path_factory.mktemp("rehearsal"))


def play(out: Path, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """What each scenario did; the traceback of one that failed."""
    changes = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "MIXQUANT_CACHE_DIR": str(out / "cache")}
    environment = {**os.environ, **changes}
    script = ROOT / "tests" / "support" / "rehearsal.py"
    with (out / "log").open("wb") as log:
        command = [sys.executable, "-W", "ignore", script, out, *names]
        subprocess.run(command, env=environment, stdout=log, stderr=log, cwd=out, timeout=400)
    results: dict[str, Any] = {}
    for name in names:
        done, failed = out / f"{name}.pt", out / f"{name}.txt"
        if done.exists():
            results[name] = torch.load(done, weights_only=False)
        else:
            results[name] = failed.read_text() if failed.exists() else (out / "log").read_text()[-3000:]
    return results


def passes_of(played: dict[str, Any], name: str) -> dict[str, Any]:
    assert not isinstance(played[name], str), f"{name}: {played[name]}"
    return played[name]["passes"]  # type: ignore[no-any-return]


def low(ran: dict[str, int]) -> set[str]:
    return {call.split()[-1] for call in ran if not call.startswith("dual")}


def words(name: str) -> str:
    """What low prompt rows count under: `auto` has attention's linears and down_proj in fp8."""
    return "nvfp4+fp8" if name.startswith("auto") else "nvfp4"


def is_bf16(name: str, which: str) -> bool:
    """Whether the pass is BF16 for all rows."""
    if name == "nvfp4-everywhere" or name.startswith("nvfp4-everywhere,"):
        return False
    if which.startswith(("decode", "asked")):
        return True
    return name.endswith("min_tokens") and int(which.rpartition(" ")[2]) < MIN_TOKENS


def dual_gemms(name: str, which: str) -> int:
    """How often SGLang's fused gate and up projections run: as without the plugin, but in BF16 passes alone."""
    few = which.startswith("decode") or int(which.rpartition(" ")[2]) <= 16
    bf16 = name == "stock" or is_bf16(name, which)
    return LAYERS if HAS_DUAL_GEMM and few and bf16 and "SM120" not in name else 0


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_captures_and_serves(played: dict[str, Any], name: str) -> None:
    assert not isinstance(played[name], str), f"{name}: {played[name]}"


@pytest.mark.parametrize("name", OURS)
def test_captured_graphs(played: dict[str, Any], name: str) -> None:
    """Also those of 4 to 16 rows, which SGLang's fused BF16 kernel would take: a graph is low unless no low pass can
    replay it."""
    passes_of(played, name)
    for rows, ran in played[name]["captured"].items():
        bf16 = name.endswith("min_tokens") and rows < MIN_TOKENS
        assert (not low(ran)) if bf16 else (low(ran) >= MLP), (rows, ran)
        fused = LAYERS if bf16 and HAS_DUAL_GEMM and rows <= 16 else 0
        assert ran.get("dual 512x128", 0) == fused, (rows, ran)
    assert [*played[name]["captured"]] == [*reversed(BUCKETS)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_is_what_ran(played: dict[str, Any], name: str) -> None:
    passes = passes_of(played, name)
    expected = {*PASSES, "decode", "decode behind bf16"}
    assert {*passes} == {which for which in expected if "everywhere" not in name or "bf16" not in which}
    for which, done in passes.items():
        ran = done["ran"]
        assert ran.get("dual 512x128", 0) == dual_gemms(name, which), (which, ran)
        if name == "stock":
            assert not low(ran)
            continue
        assert bool(low(ran)) != is_bf16(name, which), (which, ran)
        if low(ran):
            assert low(ran) >= MLP, (which, ran)
        counted = {precision for (_, precision), rows in done["counted"].items() if rows and precision != "bf16"}
        label = "bf16" if is_bf16(name, which) else words(name)
        assert counted == {label} - {"bf16"}, which
        assert done["precision"] in ("", label)


@pytest.mark.parametrize(
    ("native", "emulated"),
    [
        ("auto", "auto, emulated"),
        ("nvfp4, FlashInfer's quantiser", "nvfp4, emulated"),
        ("nvfp4-everywhere", "nvfp4-everywhere, emulated"),
    ],
)
def test_native_gives_the_numbers_of_the_emulated_kernel(played: dict[str, Any], native: str, emulated: str) -> None:
    ours, theirs = passes_of(played, native), passes_of(played, emulated)
    for which in ours:
        assert torch.equal(ours[which]["logits"], theirs[which]["logits"]), which
        assert bool(ours[which]["logits"].isfinite().all())
    assert any(call.startswith("nvfp4") for call in ours["prompts, 4"]["ran"])
    assert any(call.startswith("emulated nvfp4") for call in theirs["prompts, 4"]["ran"])


def test_low_passes_are_the_same_on_every_blackwell(played: dict[str, Any]) -> None:
    sm100, sm120 = passes_of(played, "auto"), passes_of(played, "auto on SM120")
    for which in PASSES:
        same = torch.equal(sm100[which]["logits"], sm120[which]["logits"])
        fused = dual_gemms("auto", which) > 0  # rounds otherwise than two kernels
        assert same != fused, which


@pytest.mark.parametrize("name", [name for name in OURS if "SM120" not in name and "everywhere" not in name])
def test_bf16_is_stock_to_the_bit(played: dict[str, Any], name: str) -> None:
    """A request that asked for BF16 and the tokens behind it, fused kernels of few rows included."""
    ours, stock = passes_of(played, name), passes_of(played, "stock")
    for which in ("decode behind bf16", *(which for which in PASSES if is_bf16(name, which))):
        assert torch.equal(ours[which]["logits"], stock[which]["logits"]), which
    assert not torch.equal(ours["prompts, 64"]["logits"], stock["prompts, 64"]["logits"])


@pytest.mark.parametrize("name", OURS)
def test_replayed_graphs(played: dict[str, Any], name: str) -> None:
    """A low pass replays a low graph, a BF16 pass a BF16 one; the numbers are those of the eager pass."""
    for which, done in passes_of(played, name).items():
        if which.startswith("decode"):
            continue
        rows = int(which.rpartition(" ")[2])
        has_graph = name.endswith("min_tokens") and rows < MIN_TOKENS if is_bf16(name, which) else True
        assert (done["replayed"] is not None) == (has_graph and rows in BUCKETS), which
        if done["replayed"] is not None:
            assert torch.equal(done["replayed"], done["logits"]), which


@pytest.mark.parametrize("name", OURS)
def test_a_graph_for_the_largest_pass_below_min_tokens(played: dict[str, Any], name: str) -> None:
    passes_of(played, name)
    assert played[name]["sizes"] == sorted([4, 8, 16, 32, *([1, 12] if name.endswith("min_tokens") else [])])


@pytest.mark.parametrize("name", OURS)
def test_the_report_says_what_ran(played: dict[str, Any], name: str) -> None:
    """Over all passes, warm-up included: tokens by phase and precision, and the kernels."""
    passes, state = passes_of(played, name), played[name]["state"]
    kernel = "emulated" if name.endswith("emulated") else "native"
    assert {*state["kernel"].values()} == {kernel}
    low_decode = "everywhere" in name
    assert {*state["tokens"]["decode"]} == {"nvfp4" if low_decode else "bf16"}
    assert bool(low(passes["decode"]["ran"])) == low_decode
    assert state["tokens"]["prefill"].get(words(name), 0) > 0
    agreed = played[name]["at_load"]  # the check at load ran both kernels
    assert (kernel == "native") == any(call.startswith("nvfp4") for call in agreed)
