"""`mixquant quantize` of experts: a linear for each, in both layouts, whichever way the checkpoint holds them."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.tools.quantize.scales import encode_scale
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, MODELOPT, Layout
from tests.support import moe_checkpoints as moe
from tests.support.moe_checkpoints import EXPERTS, FAMILIES, HIDDEN, INNER, LAYERS, Tensors
from tests.support.nvfp4_checkpoints import save
from tests.unit.test_checkpoint import Killed, config_of, contents, decompressed, kill_at, read

LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)


def written(loaded: Tensors, module: str, layout: Layout) -> NVFP4Tensor:
    outer = loaded[f"{module}.{layout.tensor_scale}"].reshape(())
    return NVFP4Tensor(
        loaded[f"{module}.{layout.codes}"],
        loaded[f"{module}.{layout.scales}"],
        outer.reciprocal() if layout.encodes else outer,
    )


def model(folder: Path, family: str, made: Tensors | None = None, shards: int = 0) -> Path:
    return save(folder, made or moe.tensors(family), moe.config(family), shards)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_written(tmp_path: Path, family: str, layout: Layout) -> None:
    weights, made = moe.expert_weights(), moe.tensors(family)
    source = model(tmp_path / "model", family, made, shards=3)
    targets = quantize_checkpoint(source, tmp_path / "out", scales="search", layout=layout)
    loaded = read(tmp_path / "out")
    assert targets.experts == 3 * EXPERTS * LAYERS
    for key, module in moe.names(family).items():
        layer, expert, role = key.split(".")
        weight = weights[key]
        fused = ("gate", "up") if role != "down" else ("down",)
        g = encode_scale(max(float(weights[f"{layer}.{expert}.{other}"].abs().max()) for other in fused))
        found = written(loaded, module, layout)
        expected = nvfp4.quantize(weight, scales="search", tensor_scale=g.reciprocal()[0])
        assert torch.equal(found.packed, expected.packed)
        assert torch.equal(found.block_scales.view(torch.uint8), expected.block_scales.view(torch.uint8))
        assert torch.equal(found.tensor_scale, g.reciprocal()[0])
        assert found.shape == weight.shape
        stored = loaded[f"{module}.{layout.input_scale}"]
        assert stored.shape == ((1,) if layout is COMPRESSED_TENSORS else ()) and float(stored) == 1
    in_one = {
        f"{FAMILIES[family].experts(layer)}.{leaf}" for layer in range(2) for leaf in ("gate_up_proj", "down_proj")
    }
    assert not in_one & loaded.keys()
    for name, tensor in made.items():
        if name not in in_one and name.removesuffix(".weight") not in targets.quantised:
            assert torch.equal(loaded[name], tensor)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(loaded)


def test_the_layouts_hold_the_same_numbers(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "qwen3_5_moe")
    both = []
    for layout in LAYOUTS:
        out = tmp_path / layout.name
        targets = quantize_checkpoint(source, out, layout=layout)
        both.append({module: written(read(out), module, layout) for module in targets.quantised})
    assert both[0].keys() == both[1].keys() and len(both[0]) > 3 * EXPERTS * LAYERS
    for module, found in both[0].items():
        assert torch.equal(found.dequantize(torch.float32), both[1][module].dequantize(torch.float32))


def test_compressed_tensors_reads_experts(tmp_path: Path) -> None:
    quantize_checkpoint(model(tmp_path / "model", "gemma4"), tmp_path / "out")
    loaded, config = read(tmp_path / "out"), config_of(tmp_path / "out")
    for module in moe.names("gemma4").values():
        assert torch.equal(
            decompressed(loaded, config, module), written(loaded, module, COMPRESSED_TENSORS).dequantize()
        )


def test_modelopt_config(tmp_path: Path) -> None:
    quantize_checkpoint(model(tmp_path / "model", "mixtral"), tmp_path / "out", layout=MODELOPT)
    said = config_of(tmp_path / "out")["quantization_config"]
    assert (said["quant_method"], said["quant_algo"]) == ("modelopt", "NVFP4")
    assert said["config_groups"]["group_0"]["weights"]["group_size"] == 16
    file = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert file["quant_algo"] == "NVFP4" and file["exclude_modules"] == said["ignore"]
    assert set(said["ignore"]) == {"lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(LAYERS))}
    with pytest.raises(MixQuantError, match="is quantised already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again")


# What stays


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_are_ignored(tmp_path: Path, family: str, layout: Layout) -> None:
    """As SGLang asks: by ``gate_proj``, ``up_proj`` and ``down_proj`` of expert 0, and by the layer's own name."""
    made, layer = moe.tensors(family), FAMILIES[family].experts(1)
    pattern = f"re:.*{re.escape(layer.partition('layers.')[2])}"
    targets = quantize_checkpoint(
        model(tmp_path / "model", family, made), tmp_path / "out", ignore=[pattern], layout=layout
    )
    assert targets.kept[layer] == f"--ignore {pattern}" and targets.experts == 3 * EXPERTS
    loaded = read(tmp_path / "out")
    for name, tensor in made.items():
        if name.startswith(layer):
            assert torch.equal(loaded[name], tensor)
    ignore = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    other = FAMILIES[family].experts(0)
    if layout is COMPRESSED_TENSORS:
        asked = [f"{{}}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
        assert all(question.format(layer) in ignore for question in asked)
        assert all(question.format(other) not in ignore for question in asked)
        (regex,) = (entry.removeprefix("re:") for entry in ignore if entry.startswith("re:") and ".moe" not in entry)
        assert re.match(regex, f"{layer}.3.w2") and not re.match(regex, f"{other}.3.w2")
    else:
        assert f"{layer}*" in ignore and f"{other}*" not in ignore
    if family == "gemma4":  # SGLang's name for it
        assert any("layers.1.moe.experts" in entry for entry in ignore)


def test_single_experts_cannot_be_ignored(tmp_path: Path) -> None:
    for family in ("qwen3_moe", "qwen3_5_moe"):
        with pytest.raises(MixQuantError) as caught:
            quantize_checkpoint(
                model(tmp_path / family, family), tmp_path / "out", ignore=[r"re:.*experts\.[12]\.down_proj"]
            )
        assert "experts an engine runs in one precision; ignore" in str(caught.value).replace("whose ", "")
        assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_experts_of_odd_sizes_stay_together(tmp_path: Path) -> None:
    """SGLang refuses a layer whose projections have different schemes."""
    made = moe.tensors("qwen3_moe")
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            for leaf in ("gate_proj", "up_proj"):
                made[f"{at}.{leaf}.weight"] = made[f"{at}.{leaf}.weight"][:40].clone()
            made[f"{at}.down_proj.weight"] = made[f"{at}.down_proj.weight"][:, :40].clone()
    targets = quantize_checkpoint(model(tmp_path / "model", "qwen3_moe", made), tmp_path / "out")
    assert targets.experts == 0
    assert targets.kept["model.layers.0.mlp.experts"] == (
        "K = 40 of model.layers.0.mlp.experts.0.down_proj is not a multiple of 16"
    )


def test_experts_of_draft_layers_stay(tmp_path: Path) -> None:
    made = moe.tensors("qwen3_moe")
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for block in ("mtp.layers.0", f"model.layers.{LAYERS}"):
            made[f"{block}.mlp.experts.0.{leaf}.weight"] = made[f"model.layers.0.mlp.experts.0.{leaf}.weight"].clone()
    made["mtp.layers.1.mlp.experts.gate_up_proj"] = torch.ones(3, 4, 5).bfloat16()
    targets = quantize_checkpoint(model(tmp_path / "model", "qwen3_moe", made), tmp_path / "out")
    assert targets.experts == 3 * EXPERTS * LAYERS
    for layer in ("mtp.layers.0.mlp.experts", f"model.layers.{LAYERS}.mlp.experts", "mtp.layers.1.mlp.experts"):
        assert targets.kept[layer] == "never quantised"
    ignore = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    asked = "model.layers.0.mlp.experts.0.gate_proj"
    assert not any(re.match(entry.removeprefix("re:"), asked) for entry in ignore if entry.startswith("re:"))


def test_llama4_keeps_what_sglang_reorders(tmp_path: Path) -> None:
    targets = quantize_checkpoint(model(tmp_path / "model", "llama4"), tmp_path / "out")
    kept = {name for name, why in targets.kept.items() if "reorders it" in why}
    assert kept == {f"language_model.model.layers.{i}.self_attn.{leaf}_proj" for i in range(LAYERS) for leaf in "qkv"}


# What is refused


def gpt_oss() -> tuple[Tensors, dict[str, Any]]:
    made = moe.tensors("llama4")
    renamed = {name.replace("language_model.", "").replace("feed_forward", "mlp"): t for name, t in made.items()}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp.experts"
        renamed[f"{at}.gate_up_proj_bias"] = torch.zeros(EXPERTS, 2 * INNER).bfloat16()
        renamed[f"{at}.down_proj_bias"] = torch.zeros(EXPERTS, HIDDEN).bfloat16()
    return renamed, {"model_type": "gpt_oss", "num_hidden_layers": LAYERS}


def test_gpt_oss_is_refused_but_for_its_other_linears(tmp_path: Path) -> None:
    made, config = gpt_oss()
    source = save(tmp_path / "model", made, config)
    with pytest.raises(MixQuantError) as caught:
        quantize_checkpoint(source, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 and "leave it BF16 with --ignore 're:.*experts'" in str(
        caught.value
    )
    targets = quantize_checkpoint(source, tmp_path / "out", ignore=["re:.*experts"])
    assert targets.experts == 0 and "model.layers.0.self_attn.q_proj" in targets.quantised
    assert torch.equal(
        read(tmp_path / "out")["model.layers.0.mlp.experts.down_proj_bias"], torch.zeros(4, 64).bfloat16()
    )


def test_an_unknown_family_with_fused_experts_is_refused(tmp_path: Path) -> None:
    config = moe.config("qwen3_5_moe")
    config["text_config"]["model_type"] = "newest"
    with pytest.raises(MixQuantError, match=r"expert by expert for gemma4, .*, and this is newest; leave it"):
        quantize_checkpoint(save(tmp_path / "model", moe.tensors("qwen3_5_moe"), config), tmp_path / "out")


def test_fused_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = moe.tensors("qwen3_5_moe")
    key = "model.language_model.layers.1.mlp.experts.down_proj"
    made[key] = made[key][:, :, :-16].clone()
    with pytest.raises(
        MixQuantError, match=r"gate_up_proj is \[4, 96, 64\], which does not fit down_proj \[4, 64, 32\]"
    ):
        quantize_checkpoint(model(tmp_path / "model", "qwen3_5_moe", made), tmp_path / "out")


def test_fused_tensors_of_other_dimensions_are_refused(tmp_path: Path) -> None:
    made = moe.tensors("qwen3_5_moe")
    key = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    made[key] = made[key].flatten(0, 1)
    with pytest.raises(MixQuantError, match=r"gate_up_proj is \[384, 64\], which does not fit down_proj \[4, 64, 48\]"):
        quantize_checkpoint(model(tmp_path / "model", "qwen3_5_moe", made), tmp_path / "out")


def test_incomplete_experts_are_refused(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts"
    for missing in ("model.layers.1.mlp.experts.2.up_proj", f"{at}.0.down_proj"):
        made = moe.tensors("qwen3_moe")
        del made[f"{missing}.weight"]
        with pytest.raises(MixQuantError, match=rf"{re.escape(missing)}\.weight is missing"):
            quantize_checkpoint(model(tmp_path / missing, "qwen3_moe", made), tmp_path / "out")
    gone: dict[str, tuple[str, str]] = {
        "first": (rf"{at}\.0\.", rf"{at}\.0\.\w+\.weight is missing"),
        "last": (rf"{at}\.3\.", rf"{at} has 3 experts, but config.json says 4"),
        "gates": (r".*experts\.\d\.gate_proj", r"have down_proj, up_proj; allowed: .*; leave them BF16 with --ignore"),
    }
    for name, (pattern, message) in gone.items():
        made = {key: value for key, value in moe.tensors("qwen3_moe").items() if not re.match(pattern, key)}
        with pytest.raises(MixQuantError, match=message):
            quantize_checkpoint(model(tmp_path / name, "qwen3_moe", made), tmp_path / "out")
    made = moe.tensors("qwen3_moe")
    made["model.layers.0.mlp.experts.1.up_proj.weight"] = torch.ones(32, HIDDEN).bfloat16()
    with pytest.raises(MixQuantError, match=r"up_proj is \[32, 64\] in one expert, \[48, 64\] in another"):
        quantize_checkpoint(model(tmp_path / "sizes", "qwen3_moe", made), tmp_path / "out")


def test_experts_under_another_name_are_refused(tmp_path: Path) -> None:
    made = {**moe.tensors("qwen3_moe"), "model.layers.0.block_sparse_moe.input_linear.weight": torch.ones(4, 8, 16)}
    with pytest.raises(
        MixQuantError, match=r"input_linear\.weight \[4, 8, 16\] holds all experts of a layer in a form"
    ):
        quantize_checkpoint(model(tmp_path / "model", "qwen3_moe", made), tmp_path / "out")
    made = {**moe.tensors("qwen3_moe"), "model.layers.0.linear_attn.conv1d.weight": torch.ones(4, 1, 16)}
    quantize_checkpoint(model(tmp_path / "conv", "qwen3_moe", made), tmp_path / "conv_out")


def test_a_count_of_experts_that_is_a_list_says_nothing(tmp_path: Path) -> None:
    config = moe.config("qwen3_moe") | {"num_experts": [EXPERTS, EXPERTS]}
    source = save(tmp_path / "model", moe.tensors("qwen3_moe"), config)
    assert quantize_checkpoint(source, tmp_path / "out").experts == 3 * EXPERTS * LAYERS


def test_an_expert_of_zeros(tmp_path: Path) -> None:
    weights = moe.expert_weights()
    for role in ("gate", "up", "down"):
        weights[f"1.2.{role}"].zero_()
    source = model(tmp_path / "model", "qwen3_moe", moe.tensors("qwen3_moe", weights))
    quantize_checkpoint(source, tmp_path / "out", layout=MODELOPT)
    found = written(read(tmp_path / "out"), "model.layers.1.mlp.experts.2.up_proj", MODELOPT)
    assert bool((found.dequantize() == 0).all()) and bool(found.tensor_scale.isfinite())


def test_nan_in_one_expert_is_named(tmp_path: Path) -> None:
    made = moe.tensors("llama4")
    made["language_model.model.layers.1.feed_forward.experts.gate_up_proj"][2, 5, 7] = float("nan")
    with pytest.raises(MixQuantError, match=r"layers\.1\.feed_forward\.experts\.gate_up_proj contains NaN or infinity"):
        quantize_checkpoint(model(tmp_path / "model", "llama4", made), tmp_path / "out")


# Memory and interruption


@pytest.mark.parametrize("form", ["one", "transposed"])
def test_memory_is_an_expert(tmp_path: Path, form: str) -> None:
    experts, inner, hidden = 32, 128, 256
    shapes = {"gate_up_proj": (experts, 2 * inner, hidden), "down_proj": (experts, hidden, inner)}
    family = "gemma4" if form == "one" else "llama4"
    made = {}
    for leaf, (e, n, k) in shapes.items():
        shape = (e, n, k) if form == "one" else (e, k, n)
        made[f"{FAMILIES[family].experts(0)}.{leaf}"] = torch.ones(shape, dtype=torch.bfloat16)
    config = moe.config(family)
    config["text_config"]["num_experts"] = experts
    source = save(tmp_path / "model", made, config)
    del made
    tracemalloc.start()
    targets = quantize_checkpoint(source, tmp_path / "out")
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert targets.experts == 3 * experts
    one = 2 * inner * hidden * 2
    assert held < 4 * one + 2**19 < experts * one  # and headers and names


def test_interrupted_and_gone_on_with(tmp_path: Path) -> None:
    source, whole = model(tmp_path / "model", "qwen3_5_moe", shards=3), tmp_path / "whole"
    quantize_checkpoint(source, whole, layout=MODELOPT)
    expected = contents(whole)
    for call in range(1, 20):
        out = tmp_path / f"out{call}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, Path, "replace", call, after=False)
            try:
                quantize_checkpoint(source, out, layout=MODELOPT)
            except Killed:
                died = True
            else:
                died = False
        if not died:
            break
        assert not (out / "config.json").exists()
        if call == 1:
            continue  # not even the note was there
        with pytest.raises(MixQuantError, match="'ModelOpt' then, 'compressed-tensors' now"):
            quantize_checkpoint(source, out)
        quantize_checkpoint(source, out, layout=MODELOPT)
        assert contents(out) == expected
    assert call > 8
