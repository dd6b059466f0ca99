"""Does it fit: bytes by part, exactly where they are exact, and the fit of published models on 80, 141 and 192 GB."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang import recipe as recipes
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.plan.models import find_model
from mixquant_sglang.weights import footprint as module
from mixquant_sglang.weights.decoder_config import read_decoder
from mixquant_sglang.weights.footprint import MEMORY_SHARE, footprint, place, shortage, smallest_tp, that_fit

H200 = Device("H200", (9, 0))  # where NVFP4 is emulated; it has the bytes of the native kernel
CONFIG: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512, "num_experts": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96},
    **{"moe_intermediate_size": 32, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
}


def test_every_part_to_the_byte() -> None:
    one = footprint(CONFIG, "fp8", H200)
    qkv, o, gate_up, down, router = 128 * 64, 64 * 64, 192 * 64, 64 * 96, 8 * 64
    experts = 3 * 8 * (64 * 64 + 64 * 32)
    assert one.embeddings == 2 * 2 * 512 * 64
    assert one.linears == 2 * (4 * (qkv + o) + gate_up + down + 3 * router)
    assert one.experts == 2 * experts
    assert one.other == one.request == 0
    assert one.packed_linears == 4 * (qkv + o) + gate_up + down + 4 * (4 * (128 + 64) + 192 + 64)  # routers stay BF16
    assert one.packed_experts == experts + 3 * 8 * 4 * (64 + 64)
    assert one.kv_token == 4 * 2 * 2 * 16 * 2
    assert one.parts().keys() == {"embeddings", "linears", "experts", "packed_linears", "packed_experts"}
    assert one.weights == sum(one.parts().values())
    assert one.needed(1000, 3) == one.weights + 1000 * one.kv_token
    assert footprint(CONFIG, "nvfp4", H200).packed_experts == experts * 9 // 16 + 3 * 8 * 2 * 4
    assert footprint(CONFIG, "bf16", H200).packed == 0


def test_one_copy_of_linears_and_experts_as_they_are() -> None:
    """No BF16 weights of either are kept."""
    one, fp8 = footprint(CONFIG, "fp8-compact", H200), footprint(CONFIG, "fp8", H200)
    qkv, o, gate_up, down, router = 128 * 64, 64 * 64, 192 * 64, 64 * 96, 8 * 64
    assert one.packed_linears == fp8.packed_linears and one.linears == 2 * 3 * router
    assert one.experts == 0 and one.packed_experts == fp8.packed_experts
    assert fp8.linears - one.linears == 2 * (4 * (qkv + o) + gate_up + down)


def test_ranks_share() -> None:
    one, tp, ep = (footprint(CONFIG, "fp8", H200, *ranks) for ranks in ((1, 1), (2, 1), (2, 2)))
    assert tp.experts == ep.experts == one.experts // 2
    assert ep.packed_experts == one.packed_experts // 2 < tp.packed_experts  # tp: halved rows, w2's scales whole
    assert tp.kv_token == one.kv_token // 2
    assert tp.embeddings == one.embeddings // 2
    router = 3 * 2 * 8 * 64
    assert tp.linears - router == (one.linears - router) // 2  # routers are on every rank
    assert footprint(CONFIG, "fp8", H200, 4).kv_token == tp.kv_token  # two KV heads on four ranks


def test_rules_of_a_recipe_reach_experts(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\nprefill: {precision: fp8}\nlayers:\n- {match: 're:.*layers.[12].mlp.experts$', prefill: bf16}\n"
    )
    whole, part = (footprint(CONFIG, name, H200) for name in ("fp8", str(file)))
    assert part.packed_experts * 3 == whole.packed_experts
    assert part.packed_linears == whole.packed_linears
    kept = footprint(CONFIG, module.keeping_experts(recipes.load("fp8")), H200)
    assert (kept.packed_experts, kept.packed_linears) == (0, whole.packed_linears)
    file.write_text("version: 1\nprefill: {precision: fp8}\nlayers:\n- {match: 're:.*expert$', prefill: bf16}\n")
    with pytest.raises(MixQuantError, match="matches no layer"):
        footprint(CONFIG, str(file), H200)


def test_a_shape_that_no_kernel_takes_is_not_packed() -> None:
    odd = {**CONFIG, "moe_intermediate_size": 40}  # K = 40 of the second matrix is no multiple of 16
    assert footprint(odd, "fp8", H200).packed_experts == 0
    assert footprint(odd, "fp8", H200).packed_linears == footprint(CONFIG, "fp8", H200).packed_linears
    fp8 = recipes.load("fp8")
    (experts,) = (one for one in place(read_decoder(odd, "x"), fp8, select(fp8, H200)) if one.experts)
    assert (experts.prefill, experts.decode, experts.count) == ("bf16", "bf16", 3)
    assert "multiple of 16" in (experts.refusal or "")


def test_what_sglang_does_not_offer_stays_bf16() -> None:
    odd = {**CONFIG, "model_type": "stablelm", "num_experts": None}
    fp8 = recipes.load("fp8")
    placed = place(read_decoder(odd, "x"), fp8, select(fp8, H200))
    assert {one.name for one in placed if one.prefill == "fp8"} == {"mlp.gate_up_proj", "mlp.down_proj"}
    assert {one.refusal for one in placed if one.prefill == "bf16"} == {"SGLang gives it no quantization config"}
    bf16 = recipes.load("bf16")
    assert not any(one.refusal for one in place(read_decoder(odd, "x"), bf16, select(bf16, H200)))


# A study of both SGLang versions, from published dimensions: GB (1e9 bytes) in BF16, and with a copy in FP8 and NVFP4.
SIZES = {
    "Qwen3-30B-A3B": (61, 91, 78),
    "Qwen3.5-35B-A3B": (71, 105, 90),
    "Gemma-4-26B-A4B": (52, 76, 65),
    "GLM-4.5-Air": (214, 318, 273),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_published_models(name: str) -> None:
    made = [footprint(find_model(name), recipe, H200).weights / 1e9 for recipe in ("bf16", "fp8", "nvfp4")]
    assert made == pytest.approx(SIZES[name], rel=0.015)


FITS = [  # recipe, GPU, GB, GPUs
    ("Qwen3-30B-A3B", "fp8", H200, 80, 2),
    ("Qwen3-30B-A3B", "fp8", H200, 141, 1),
    ("Qwen3-30B-A3B", "bf16", H200, 80, 1),
    ("Qwen3.5-35B-A3B", "fp8", H200, 80, 2),
    ("Qwen3.5-35B-A3B", "fp8", H200, 141, 1),
    ("Gemma-4-26B-A4B", "fp8", H200, 80, 2),
    ("Gemma-4-26B-A4B", "nvfp4", H200, 80, 1),
    ("Gemma-4-26B-A4B", "fp8", H200, 141, 1),
    ("GLM-4.5-Air", "fp8", H200, 80, 8),
    ("GLM-4.5-Air", "fp8", H200, 141, 4),
    ("GLM-4.5-Air", "nvfp4", H200, 141, 4),
    ("GLM-4.5-Air", "fp8", H200, 192, 2),
]


@pytest.mark.parametrize(("name", "recipe", "device", "memory", "gpus"), FITS)
def test_how_many_gpus_hold_it(name: str, recipe: str, device: Device, memory: int, gpus: int) -> None:
    assert smallest_tp(find_model(name), recipe, device, memory * 1e9) == gpus


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_the_documents(name: str) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "tools.md").read_text()
    (row,) = re.findall(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    made = [footprint(find_model(name), recipe, H200).weights / 1e9 for recipe in ("bf16", "fp8", "nvfp4")]
    assert cells[:3] == [f"{size:.0f}" for size in made]
    for memory, cell in zip((80, 141, 192), cells[3:], strict=True):
        fp8, nvfp4 = (smallest_tp(find_model(name), recipe, H200, memory * 1e9) for recipe in ("fp8", "nvfp4"))
        words = {f"`--tp {fp8}`" if fp8 != 1 else "yes"}
        words |= {f"`--tp {fp8}`, NVFP4 `--tp {nvfp4}`", f"NVFP4, else `--tp {fp8}`"} if nvfp4 != fp8 else set()
        assert cell in words
        assert ("NVFP4" in cell) == (nvfp4 != fp8)


def test_what_would_fit() -> None:
    model = find_model("Qwen3-30B-A3B")
    rule = module.KEEP_EXPERTS
    names = [name for name, _ in that_fit(model, 80e9, H200)]
    assert names == [f"fp8 {rule}", f"nvfp4-fp8-down {rule}", f"nvfp4-fp8 {rule}", f"nvfp4 {rule}", "bf16"]
    assert [name for name, _ in that_fit(model, 141e9, H200)][:4] == ["fp8", "nvfp4-fp8-down", "nvfp4-fp8", "nvfp4"]
    assert that_fit(model, 60e9, H200) == []
    for _, one in that_fit(model, 80e9, H200, tokens=50_000):
        assert one.needed(50_000, 1) <= MEMORY_SHARE * 80e9
    left = dict(that_fit(model, 80e9, H200))["bf16"].tokens_left(80e9)
    assert that_fit(model, 80e9, H200, tokens=left)
    assert not that_fit(model, 80e9, H200, tokens=left + 2)
    dense = [name for name, _ in that_fit(find_model("Llama-3.1-70B"), 203e9, H200)]
    assert dense == ["nvfp4", "bf16"]  # no experts to keep
    assert that_fit(model, 46e9, H200, tp=2, ep=2)


def test_states_and_windows() -> None:
    hybrid = find_model("Qwen3.5-35B-A3B")
    one = footprint(hybrid, "bf16", H200)
    assert one.kv_token == 10 * 2 * 2 * 256 * 2  # ten of forty layers
    assert one.request == 30 * (32 * 128 * 128 * 4 + 8192 * 3 * 2)  # SGLang's mamba_cache_per_req, states in FP32
    room = MEMORY_SHARE * 141e9 - one.weights
    assert one.tokens_left(141e9) == int(room / 1.9 / one.kv_token)
    gemma = footprint(find_model("Gemma-4-26B-A4B"), "bf16", H200)
    assert gemma.kv_token == 5 * 2 * 2 * 512 * 2 + 0.8 * 25 * 2 * 8 * 256 * 2
    assert footprint(find_model("GLM-4.7-Flash"), "bf16", H200, 4).kv_token == 47 * 2 * 576


def test_the_shape_of_a_server_out_of_memory() -> None:
    """What a host does with it: a parsed config.json, no model name."""
    with pytest.raises(MixQuantError, match=r"config\.json: num_hidden_layers: is missing"):
        footprint({"hidden_size": 8}, "fp8", H200)
    with pytest.raises(MixQuantError, match="--tp: 3 does not divide the model"):
        footprint(CONFIG, "fp8", H200, tp=3)
    assert smallest_tp(CONFIG, "fp8", H200, 1e3) is None


def test_a_line_for_a_server_out_of_memory() -> None:
    line = shortage(find_model("Qwen3-30B-A3B"), recipes.load("fp8"), Device("H100", (9, 0)), 80e9)
    assert line == (
        "recipe fp8 takes 91.1 GB of each H100, SM90 (30.0 of it packed beside 61.1 GB of BF16 weights) and 98.3 kB "
        "for each token; about 72.0 of 80.0 GB are for them; it fits on --tp 2; on --tp 1 fit: "
        f"fp8 {module.KEEP_EXPERTS}, "
        f"nvfp4-fp8-down {module.KEEP_EXPERTS}, nvfp4-fp8 {module.KEEP_EXPERTS}, nvfp4 {module.KEEP_EXPERTS}, bf16"
    )
    assert shortage(CONFIG, "fp8", H200, 1e3).endswith("it fits on none; on --tp 1 fit: none")


def test_it_needs_neither_torch_nor_sglang() -> None:
    code = f"import sys, {module.__name__}; assert not {{'torch', 'sglang'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
