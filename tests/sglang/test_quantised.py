"""Quantised checkpoints as the only weights, on real ``ModelRunner``s: tokens, what is said, refusals and updates."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.host import quantised as host_quantised
from tests.support import exact_checkpoints, model_runs, quantised_checkpoints
from tests.support.processes import module

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen3"
Results = dict[str, Any]
DOWN = "layers:\n  - {match: 're:.*down_proj', prefill: bf16, decode: bf16}\n"  # K = 704 is no multiple of 128
LEFT = f"layers:\n  - {{match: {quantised_checkpoints.LEFT}, prefill: bf16, decode: bf16}}\n"
RULES = {"fp8 blocks": DOWN}
ONLY = {"nvfp4 parts": "w4a16", "fp8 tensor": "w8a16", "fp8 blocks": "w8a16"}  # precision of all rows
COMPACT = {"nvfp4 modelopt": ("nvfp4", "w4a16"), "fp8 rows": ("fp8", "w8a16")}
_QKV = "layers:\n  - {match: model.layers.3.self_attn.qkv_proj, prefill: bf16, decode: bf16}\n"
LACKS = {
    "down_proj": ("model.layers.3.mlp.down_proj", ""),
    "v_proj": ("model.layers.2.self_attn.v_proj", ""),
    "v_proj by rule": ("model.layers.3.self_attn.v_proj", _QKV),
    "a BF16 linear": (quantised_checkpoints.LEFT, ""),
    "a norm": ("model.layers.3.input_layernorm", ""),
    "the table": ("model.embed_tokens", ""),
    "the last norm": ("model.norm", ""),
}


def recipe(folder: Path, prefill: str, decode: str, rules: str = "") -> str:
    file = folder / f"recipe-{len([*folder.iterdir()])}.yaml"
    file.write_text(f"version: 1\nprefill: {{precision: {prefill}}}\ndecode: {{precision: {decode}}}\n{rules}")
    return str(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Results]:
    folder = tmp_path_factory.mktemp("quantised")
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for kind, precision in ONLY.items():
        made, plain = quantised_checkpoints.write(TINY, folder / kind.replace(" ", "-"), kind)
        asked = recipe(folder, precision, precision, RULES.get(kind, ""))
        cases[kind, "quantised"] = {"model": str(made), "recipe": asked}
        cases[kind, "plain"] = {"model": str(plain)}
    for kind, (prefill, decode) in COMPACT.items():
        exact = exact_checkpoints.write(TINY, folder / f"exact-{prefill}", prefill)
        beside = kind == "nvfp4 modelopt"
        made, plain = quantised_checkpoints.write(exact, folder / kind.replace(" ", "-"), kind, beside=beside)
        cases[kind, "quantised"] = {"model": str(made), "recipe": f"{prefill}-compact"}
        cases[kind, "plain"] = {"model": str(plain), "recipe": recipe(folder, prefill, decode, LEFT)}
    blocks = cases["fp8 blocks", "quantised"]["model"]
    cases["fp8 blocks", "compact"] = {"model": blocks, "recipe": recipe(folder, "fp8", "w8a16", DOWN)}
    cases["fp8 blocks", "no rule"] = {"model": blocks, "recipe": "fp8-compact"}
    rows = cases["fp8 tensor", "quantised"]["model"]
    cases["fp8 tensor", "cache"] = {"model": rows, "recipe": "fp8-compact", "args": {"kv_cache_dtype": "fp8_e4m3"}}
    cases["fp8 blocks", "auto"] = {"model": blocks, "recipe": "auto"}
    for label, (gone, rule) in LACKS.items():
        made = quantised_checkpoints.without(TINY, folder / f"lacks-{gone}", "fp8 rows", gone)
        cases["lacks", label] = {"model": str(made), "recipe": recipe(folder, "fp8", "w8a16", rule)}
    common = {"prompts": [20], "steps": 2, "fp32_sums": True, "survive": True}
    found = model_runs.run([case | common for case in cases.values()], folder, model_runs.CPU, 600)
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("kind", [*ONLY, *COMPACT])
def test_logits_are_those_of_the_same_weights_multiplied_out(runs: dict[tuple[str, str], Results], kind: str) -> None:
    """To the last bit: BF16 holds the weights exactly, and the server of those multiplies in FP32 too, or packs them to
    the same numbers."""
    one, other = runs[kind, "quantised"], runs[kind, "plain"]
    assert "bits" in one and "bits" in other, (one, other)
    assert len(one["bits"]) == 3 and one["bits"] == other["bits"]


def test_what_ran_is_what_is_said(runs: dict[tuple[str, str], Results]) -> None:
    for kind, (prefill, decode) in COMPACT.items():
        found = runs[kind, "quantised"]
        tokens, state = found["after"]["tokens"], found["state"]
        assert tokens["prefill"] == {prefill: 19, decode: 1} and tokens["decode"] == {decode: 2}
        assert state["linear_weight_bytes"] < {"fp8": 0.53, "nvfp4": 0.31}[prefill] * state["bf16_linear_bytes"]
        assert any("as they are; its scales of activations are not used" in line for line in found["log"])
        assert f"mixquant: stays BF16 (BF16 in the checkpoint): {quantised_checkpoints.LEFT}" in found["log"]
    cache = [line for line in runs["nvfp4 modelopt", "quantised"]["log"] if "the KV cache is BF16" in line]
    assert len(cache) == 1 and "k_scale and 7 more" in cache[0]


def test_blocks_prefill_in_w8a8_and_leave_others_to_bf16(runs: dict[tuple[str, str], Results]) -> None:
    found, weights = runs["fp8 blocks", "compact"], runs["fp8 blocks", "quantised"]
    assert found["after"]["tokens"]["prefill"] == {"fp8": 19, "w8a16": 1}
    assert found["bits"] != weights["bits"]
    assert [token for token, _ in found["tokens"]] == [token for token, _ in weights["tokens"]]
    said = "mixquant: multiplied out to BF16 at load (by rule of the recipe): model.layers.0.mlp.down_proj"
    assert any(line.startswith(said) for line in found["log"])


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        (
            "fp8 blocks",
            "auto",
            "is already quantised (fp8 in blocks); recipe auto derives its packed weights from a plain",
        ),
        (
            "fp8 blocks",
            "no rule",
            "layers.0.mlp.down_proj cannot be taken as it is: K = 704 is not a multiple of 128",
        ),
        ("fp8 tensor", "cache", "--kv-cache-dtype fp8_e4m3: "),
    ],
)
def test_refusals(runs: dict[tuple[str, str], Results], kind: str, label: str, message: str) -> None:
    found = runs[kind, label]
    assert message in found.get("refused", found.get("error", "")), found  # the launcher's has no line of its own here


@pytest.mark.parametrize("label", LACKS)
def test_weights_that_are_missing_are_not_what_memory_held(runs: dict[tuple[str, str], Results], label: str) -> None:
    found = runs["lacks", label]
    assert f"{LACKS[label][0]}.weight is missing" in found.get("refused", ""), found


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("updates")
    made, _ = quantised_checkpoints.write(TINY, folder / "made", "fp8 rows")
    done = subprocess.run(
        module("tests.support.run_quantised", made, folder),
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Results = json.loads(done.stdout.splitlines()[-1])
    return found


def test_updates_are_taken_as_they_arrive_or_refused_whole(updates: Results) -> None:
    start = updates["start"]
    refused = {
        "no scales": "model.layers.1.self_attn.q_proj.weight came without model.layers.1.self_attn.k_proj.weight, ",
        "bf16": "model.layers.2.mlp.down_proj.weight is torch.bfloat16, not torch.float8_e4m3fn",
        "nan": "model.layers.2.mlp.down_proj.weight holds NaN",
    }
    for label, message in refused.items():
        found = updates[label]
        assert not found["done"] and found["message"].startswith(message), found
        assert found["same"] and found["prefill"] == start["prefill"] and not found["warnings"]
    for label in ("good", "back", "ipc", "disk", "disk back"):
        found = updates[label]
        assert found["done"] and found["prefill"] == start["prefill"], (label, found)
        assert found["same"] is (label not in ("good", "disk")), label
    if "session cut" in updates:  # SGLang 0.5.17 has no sessions
        qkv, cut = "model.layers.1.self_attn.qkv_proj", updates["session cut"]
        assert not cut["same"] and cut["prefill"] == {"w8a16": 40}  # as packed last, beside a new down_proj
        assert f"cannot pack {qkv}: only parts" in cut["mixed"] and cut["mixed"].endswith(f"are the weights: {qkv}")
        assert any("a weight update ended that could not be packed whole" in line for line in cut["warned"])
        mended = updates["session mended"]
        assert mended["done"] and mended["same"] and mended["mixed"] is None
    assert updates["addresses"]  # captured graphs hold them


@pytest.mark.parametrize("embeds", [False, True])
def test_a_server_of_embeddings_needs_no_lm_head(embeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_quantised, "embeds", lambda: embeds)
    asked: dict[str, list[str]] = {}
    model = torch.nn.ModuleDict(
        {"lm_head": torch.nn.Linear(2, 2, bias=False), "norm": torch.nn.LayerNorm(2, bias=False)}
    )
    run: Any = SimpleNamespace(quantised=SimpleNamespace(check_parameters=asked.update))
    matcher: Any = SimpleNamespace(shards=lambda _: [])
    host_quantised.check_all_there(run, model, matcher)
    assert [*asked] == (["norm.weight"] if embeds else ["lm_head.weight", "norm.weight"])
