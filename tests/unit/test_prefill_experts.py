"""Ready-made experts: what is read from either convention, what a rank gets of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.weights.layouts import COMPRESSED_TENSORS, MODELOPT, Layout
from mixquant_sglang.weights.names import Names
from mixquant_sglang.weights.ready_made import ReadyMadeWeights
from mixquant_sglang.weights.ready_made_experts import ExpertShare, ReadyMadeExperts
from tests.support import moe_checkpoints as moe
from tests.support.moe_checkpoints import EXPERTS, FAMILIES, HIDDEN, INNER, LAYERS, Tensors
from tests.support.nvfp4_checkpoints import MODELOPT as MODELOPT_CONFIG
from tests.support.nvfp4_checkpoints import modelopt, save
from tests.unit.test_checkpoint import config_of, read

LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)
# SGLang's names of the first layer's experts; Gemma-4's are below "moe" there, Llama-4's wrapper has it the other way.
SGLANG = {
    "qwen3_moe": "model.layers.{}.mlp.experts",
    "mixtral": "model.layers.{}.block_sparse_moe.experts",
    "qwen3_5_moe": "language_model.model.layers.{}.mlp.experts",
    "gemma4": "model.language_model.layers.{}.moe.experts",
    "llama4": "model.layers.{}.feed_forward.experts",
}


def quantised(folder: Path, family: str, layout: Layout = COMPRESSED_TENSORS, **more: Any) -> Path:
    source = save(folder / "bf16", moe.tensors(family), moe.config(family), shards=2)
    quantize_checkpoint(source, folder / "ready", scales="search", layout=layout, **more)
    return folder / "ready"


def opened(folder: Path) -> ReadyMadeWeights:
    return ReadyMadeWeights.open(str(folder), "mine.yaml:3 prefill.weights")


def layer_of(weights: ReadyMadeWeights, family: str, layer: int = 0) -> ReadyMadeExperts:
    found = weights.experts(SGLANG[family].format(layer))
    assert found is not None
    return found


def masters(
    weights: Tensors, layer: int, expert: int, rank: int = 0, ranks: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """What SGLang's loader makes of an expert: w13 [2I, H], w2 [H, I]."""
    inner = INNER // ranks
    mine = slice(rank * inner, (rank + 1) * inner)
    gate, up, down = (weights[f"{layer}.{expert}.{role}"] for role in ("gate", "up", "down"))
    return torch.cat([gate[mine], up[mine]]), down[:, mine].contiguous()


WHOLE = ExpertShare(EXPERTS, tuple(range(EXPERTS)), INNER, HIDDEN)


# What is read


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_checkpoint_gives_the_bytes_of_packing(tmp_path: Path, family: str, layout: Layout) -> None:
    weights, ready = moe.expert_weights(), opened(quantised(tmp_path, family, layout))
    for layer in range(LAYERS):
        experts = layer_of(ready, family, layer)
        experts.place(WHOLE)
        for expert in range(EXPERTS):
            w13, w2 = masters(weights, layer, expert)
            (gate, up), down = experts.load(expert, w13, w2, check=True)
            assert torch.equal(gate.tensor_scale, up.tensor_scale)
            for piece, master in ((gate, w13[:INNER]), (up, w13[INNER:]), (down, w2)):
                packed = nvfp4.quantize(master, scales="search", tensor_scale=piece.tensor_scale)
                assert torch.equal(piece.packed, packed.packed)
                assert torch.equal(piece.block_scales.view(torch.uint8), packed.block_scales.view(torch.uint8))
            usual = nvfp4.quantize(w2).tensor_scale
            assert torch.allclose(down.tensor_scale, usual, rtol=2**-22, atol=0)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (3, 0), (3, 1), (3, 2)])
def test_tensor_parallel_ranks_take_slices(tmp_path: Path, ranks: int, rank: int) -> None:
    weights, ready = moe.expert_weights(), opened(quantised(tmp_path, "qwen3_moe"))
    whole, mine = layer_of(ready, "qwen3_moe", 1), layer_of(ready, "qwen3_moe", 1)
    whole.place(WHOLE)
    inner = INNER // ranks
    mine.place(ExpertShare(EXPERTS, tuple(range(EXPERTS)), inner, HIDDEN, rank, ranks))
    rows = slice(rank * inner, (rank + 1) * inner)
    for expert in range(EXPERTS):
        (gate, up), down = mine.load(expert, *masters(weights, 1, expert, rank, ranks), check=True)
        (all_gate, all_up), all_down = whole.load(expert, *masters(weights, 1, expert), check=True)
        assert torch.equal(gate.dequantize(), all_gate.dequantize()[rows])
        assert torch.equal(up.dequantize(), all_up.dequantize()[rows])
        assert torch.equal(down.dequantize(), all_down.dequantize()[:, rows])
        assert all(p.packed.is_contiguous() and p.block_scales.is_contiguous() for p in (gate, up, down))


@pytest.mark.parametrize("rank", [0, 1])
def test_expert_parallel_ranks_take_experts(tmp_path: Path, rank: int) -> None:
    weights, ready = moe.expert_weights(), opened(quantised(tmp_path, "mixtral"))
    experts = layer_of(ready, "mixtral")
    share = ExpertShare(EXPERTS, ((0, 1), (2, 3))[rank], INNER, HIDDEN)
    experts.place(share)
    for place, expert in enumerate(share.local):
        experts.load(place, *masters(weights, 0, expert), check=True)
    with pytest.raises(MixQuantError, match=r"experts\.\d\.w1\.weight_packed is not this weight"):
        experts.load(0, *masters(weights, 0, share.local[1]), check=True)
    other = layer_of(ready, "mixtral")
    other.place(ExpertShare(EXPERTS, (3, 1), INNER, HIDDEN))  # a map of experts that is not contiguous
    other.load(0, *masters(weights, 0, 3), check=True)


def with_shared(made: Tensors, name: str) -> dict[str, torch.Tensor]:
    """The shared expert of ``qwen3_moe``'s layers under ``name``, of the experts' sizes."""
    made = {key: value for key, value in made.items() if "shared_expert" not in key}
    for layer in range(LAYERS):
        for leaf, shape in (
            ("gate_proj", (INNER, HIDDEN)),
            ("up_proj", (INNER, HIDDEN)),
            ("down_proj", (HIDDEN, INNER)),
        ):
            made[f"model.layers.{layer}.mlp.{name}.{leaf}.weight"] = torch.randn(shape).bfloat16()
    return made


@pytest.mark.parametrize("name", ["shared_expert", "shared_experts"])
def test_a_fused_shared_expert_is_the_last(tmp_path: Path, name: str) -> None:
    made = with_shared(moe.tensors("qwen3_moe"), name)
    quantize_checkpoint(save(tmp_path / "bf16", made, moe.config("qwen3_moe")), tmp_path / "ready")
    ready = opened(tmp_path / "ready")
    experts = layer_of(ready, "qwen3_moe")
    experts.place(ExpertShare(EXPERTS, (2, 3), INNER // 3, HIDDEN, rank=2, ranks=3, shared=1))
    gate, up, down = (made[f"model.layers.0.mlp.{name}.{leaf}_proj.weight"] for leaf in ("gate", "up", "down"))
    mine = slice(32, 48)
    experts.load(2, torch.cat([gate[mine], up[mine]]), down[:, mine].contiguous(), check=True)
    experts.load(0, *masters(moe.expert_weights(), 0, 2, 2, 3), check=True)
    assert f"model.layers.0.mlp.{name}.up_proj" in ready.taken


def test_a_shared_expert_of_another_precision_is_refused(tmp_path: Path) -> None:
    made = with_shared(moe.tensors("qwen3_moe"), "shared_expert")
    source = save(tmp_path / "bf16", made, moe.config("qwen3_moe"))
    quantize_checkpoint(source, tmp_path / "ready", ignore=["re:.*shared_expert"])
    experts = layer_of(opened(tmp_path / "ready"), "qwen3_moe")
    with pytest.raises(
        MixQuantError, match=r"shared_expert is not NVFP4 as .* --disable-shared-experts-fusion, or keep"
    ):
        experts.place(ExpertShare(EXPERTS, (0,), INNER, HIDDEN, shared=1))
    with pytest.raises(MixQuantError, match="2 fused shared experts; ready-made weights fit one"):
        experts.place(ExpertShare(EXPERTS, (0,), INNER, HIDDEN, shared=2))


def test_parts_may_have_scales_of_their_own(tmp_path: Path) -> None:
    made, weights = moe.tensors("qwen3_moe"), moe.expert_weights()
    modules = [*moe.names("qwen3_moe").values()]
    ready = opened(save(tmp_path, modelopt(made, modules), {**moe.config("qwen3_moe"), **_modelopt()}))
    experts = layer_of(ready, "qwen3_moe")
    experts.place(WHOLE)
    (gate, up), down = experts.load(1, *masters(weights, 0, 1), check=True)
    assert gate.tensor_scale != up.tensor_scale
    for piece, role in ((gate, "gate"), (up, "up"), (down, "down")):
        assert torch.equal(piece.dequantize(), nvfp4.quantize(weights[f"0.1.{role}"]).dequantize())


def _modelopt() -> dict[str, Any]:
    return {"quantization_config": MODELOPT_CONFIG["quantization_config"]}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    weights, experts = moe.expert_weights(), layer_of(opened(quantised(tmp_path, "gemma4")), "gemma4", 1)
    experts.place(WHOLE)
    w13, w2 = (master.cuda() for master in masters(weights, 1, 3))
    (gate, up), down = experts.load(3, w13, w2, check=True)
    assert all(p.packed.is_cuda and p.tensor_scale.is_cuda for p in (gate, up, down))


# What stays BF16


def test_a_layer_that_the_checkpoint_keeps(tmp_path: Path) -> None:
    for family in ("qwen3_moe", "gemma4"):
        ready = opened(quantised(tmp_path / family, family, ignore=[r"re:.*layers\.1\..*experts"]))
        assert ready.experts(SGLANG[family].format(0)) is not None
        assert ready.experts(SGLANG[family].format(1)) is None


def test_all_experts_have_to_be_taken_or_kept(tmp_path: Path) -> None:
    ready = opened(quantised(tmp_path, "qwen3_moe", ignore=["re:.*self_attn", "re:.*shared_expert"]))
    with pytest.raises(MixQuantError, match=r"mlp\.experts\.\d\.\w+\.weight_packed belongs to no layer of this model"):
        ready.check_all_taken()
    ready.keep_experts("model.layers.1.mlp.experts", "by rule of the recipe")
    layer_of(ready, "qwen3_moe")
    ready.check_all_taken()
    assert set(ready.unused.values()) == {"by rule of the recipe"} and len(ready.unused) == 3 * EXPERTS
    assert all(".layers.1." in name for name in ready.unused)


# What is refused

AT = "model.layers.0.mlp.experts"


def bf16(module: str) -> Callable[[Tensors], None]:
    def do(ready: Tensors) -> None:
        for leaf in ("packed", "scale", "global_scale"):
            del ready[f"{module}.weight_{leaf}"]
        del ready[f"{module}.input_global_scale"]
        ready[f"{module}.weight"] = torch.zeros(INNER, HIDDEN).bfloat16()

    return do


def drop(prefix: str) -> Callable[[Tensors], None]:
    def do(ready: Tensors) -> None:
        for name in [name for name in ready if name.startswith(prefix)]:
            del ready[name]

    return do


def more(ready: Tensors) -> None:
    for name in [name for name in ready if name.startswith(f"{AT}.0.")]:
        ready[name.replace(f"{AT}.0.", f"{AT}.{EXPERTS}.")] = ready[name].clone()


def renamed(ready: Tensors) -> None:
    for name in [name for name in ready if name.startswith(f"{AT}.") and ".down_proj." in name]:
        ready[name.replace("down_proj", "w2")] = ready.pop(name)


def shorter(ready: Tensors) -> None:
    for leaf in ("packed", "scale"):
        name = f"{AT}.3.up_proj.weight_{leaf}"
        ready[name] = ready[name][:32].clone()


def swapped(ready: Tensors) -> None:
    for leaf in ("packed", "scale", "global_scale"):
        a, b = f"{AT}.1.gate_proj.weight_{leaf}", f"{AT}.1.up_proj.weight_{leaf}"
        ready[a], ready[b] = ready[b], ready[a]


def in_one(ready: Tensors) -> None:
    drop(f"{AT}.")(ready)
    ready[f"{AT}.gate_up_proj"] = torch.zeros(EXPERTS, 2 * INNER, HIDDEN // 2, dtype=torch.uint8)


BROKEN: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "one expert in BF16": (bf16(f"{AT}.2.up_proj"), rf"{AT}\.2\.up_proj is not NVFP4, but .*; keep {AT} in BF16 with"),
    "one expert missing": (drop(f"{AT}.3."), rf"{AT}\.3\.gate_proj\.weight_packed is missing"),
    "one linear missing": (drop(f"{AT}.1.down_proj"), rf"{AT}\.1\.down_proj\.weight_packed is missing"),
    "the layer missing": (drop(f"{AT}."), rf"{AT} is missing"),
    "an expert more": (more, rf"{AT} has more experts than the 4 of the BF16 checkpoint"),
    "other names": (renamed, r"have gate_proj, up_proj, w2; allowed: gate_proj, up_proj, down_proj or w1, w3, w2"),
    "fewer rows": (shorter, rf"{AT}\.3\.up_proj\.weight_packed is U8 \[32, 32\]; .* needs U8 \[48, 32\]"),
    "gate and up swapped": (swapped, rf"{AT}\.1\.gate_proj\.weight_packed is not this weight of the BF16 checkpoint"),
    "in one tensor": (in_one, rf"{AT}\.gate_up_proj is U8; experts are read one by one, in NVFP4; keep {AT} in BF16"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints(tmp_path: Path, change: Callable[[Tensors], None], message: str) -> None:
    folder = quantised(tmp_path, "qwen3_moe")
    ready = read(folder)
    change(ready)
    save(tmp_path / "broken", ready, config_of(folder))
    weights = moe.expert_weights()
    with pytest.raises(MixQuantError, match=message) as caught:
        experts = layer_of(opened(tmp_path / "broken"), "qwen3_moe")
        experts.place(WHOLE)
        for expert in range(EXPERTS):
            experts.load(expert, *masters(weights, 0, expert), check=True)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_uneven_slices_are_refused(tmp_path: Path) -> None:
    experts = layer_of(opened(quantised(tmp_path, "qwen3_moe")), "qwen3_moe")
    with pytest.raises(MixQuantError, match="24 columns of down on a rank are not a multiple of 16"):
        experts.place(ExpertShare(EXPERTS, (0,), 24, HIDDEN, 0, 2))


def test_another_fine_tune_is_refused(tmp_path: Path) -> None:
    experts = layer_of(opened(quantised(tmp_path, "qwen3_moe")), "qwen3_moe")
    experts.place(WHOLE)
    w13, w2 = masters(moe.expert_weights(), 0, 2)
    experts.load(2, w13, w2, check=True)
    for masters_, leaf in (((w13, (w2 * 1.1).bfloat16()), "down"), (((w13 * 1.1).bfloat16(), w2), "gate")):
        with pytest.raises(MixQuantError, match=rf"{AT}\.2\.{leaf}_proj\.weight_packed is not this weight"):
            experts.load(2, *masters_, check=True)
        experts.load(2, *masters_, check=False)


def test_another_number_of_experts_is_another_model(tmp_path: Path) -> None:
    from types import SimpleNamespace

    ready = opened(quantised(tmp_path, "qwen3_moe"))
    ready.check_model(SimpleNamespace(num_experts=EXPERTS))
    with pytest.raises(MixQuantError, match=r"num_experts is 4, but 8 in the BF16 checkpoint"):
        ready.check_model(SimpleNamespace(num_experts=8))


# Names


def test_the_language_model_stands_for_itself() -> None:
    names = Names(
        [
            *("model.language_model.layers.0.mlp.up_proj.weight", "model.vision_tower.encoder.layers.0.mlp.fc1.weight"),
            *("mtp.layers.0.mlp.up_proj.weight", "lm_head.weight"),
        ]
    )
    for here in ("language_model.model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj", "layers.3.mlp.up_proj"):
        assert names.of(here) == "model.language_model.layers.3.mlp.up_proj"
    tower, draft = "vision_tower.encoder.layers.0.input_layernorm.weight", "mtp.layers.0.input_layernorm.weight"
    for name in ("lm_head", "model.language_model.norm", "model.language_model.layers.0.a", tower, draft):
        assert names.of(name) == name
    two = Names(["thinker.model.layers.0.a.weight", "talker.model.layers.0.a.weight"])
    assert two.of("model.layers.0.a") == "model.layers.0.a"


def test_linears_of_a_wrapper_are_found_too(tmp_path: Path) -> None:
    ready = opened(quantised(tmp_path, "qwen3_5_moe"))
    name = "language_model.model.layers.0.self_attn.qkv_proj"
    linear = ready.linear(name, [f"{name.removesuffix('qkv_proj')}{leaf}_proj" for leaf in "qkv"])
    assert linear is not None and linear.modules[0] == "model.language_model.layers.0.self_attn.q_proj"


def test_values_do_not_change_by_reading(tmp_path: Path) -> None:
    """Rows are read by plain reads: those of safetensors' own reader."""
    folder = quantised(tmp_path, "qwen3_moe", MODELOPT)
    ready, loaded = opened(folder), read(folder)
    module = f"{AT}.2.down_proj"
    piece = ready.read(module, slice(8, 24), slice(16, 48), torch.device("cpu"))
    wanted = NVFP4Tensor(
        loaded[f"{module}.weight"][8:24, 8:24], loaded[f"{module}.weight_scale"][8:24, 1:3], piece.tensor_scale
    )
    assert torch.equal(piece.dequantize(), wanted.dequantize())
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
