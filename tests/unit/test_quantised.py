"""Quantised checkpoints as the only weights: what is read of them, what ranks hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats.fp8 import FP8Tensor
from mixquant_sglang.formats.fp8_blocks import FP8Blocks, quantize_activations
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks import weights as update
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels import registry
from mixquant_sglang.kernels.linear.fp8_blocks import EmulatedBlockFP8
from mixquant_sglang.kernels.linear.w8a16_blocks import EmulatedBlockW8A16
from mixquant_sglang.recipe import load
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools import cli
from mixquant_sglang.weights import layouts
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.incoming import Known
from mixquant_sglang.weights.pieces import piece
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.quantised_config import check_said, family, said
from mixquant_sglang.weights.quantised_linear import QuantisedLinear
from mixquant_sglang.weights.ready_made_linear import Share
from tests.support.quantised_checkpoints import CONFIGS, WRITERS, Tensors

BLOCK = "model.layers.0.self_attn."
Q, K, V = (f"{BLOCK}{part}_proj" for part in "qkv")
QKV = f"{BLOCK}qkv_proj"


def weights(sizes: tuple[int, int, int] = (256, 128, 128), k: int = 256) -> Tensors:
    torch.manual_seed(0)
    return {
        name: (torch.randn(n, k) * 3.0**i).bfloat16() for i, (name, n) in enumerate(zip((Q, K, V), sizes, strict=True))
    }


def save(folder: Path, kind: str, made: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    said = {"quantization_config": {**CONFIGS[kind], **config}}
    (folder / "config.json").write_text(json.dumps(said))
    save_file({n: t.contiguous() for n, t in made.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantised(kind: str, masters: Tensors) -> tuple[Tensors, Tensors]:
    made: Tensors = {}
    values: Tensors = {}
    for name, weight in masters.items():
        tensors, values[name] = WRITERS[kind](name, weight)
        made |= tensors
    return made, values


def dequantised(pieces: list[Any]) -> torch.Tensor:
    return torch.cat([p.dequantize(torch.float32) for p in pieces])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_holds_its_slices_as_they_are(kind: str, ranks: int, tmp_path: Path) -> None:
    made, values = quantised(kind, weights((512, 256, 256)))
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", kind, made))
    for rank in range(ranks):
        came: list[Any] = []
        linear = QuantisedLinear(checkpoint, QKV, checkpoint.of_linear(QKV, (Q, K, V)))
        sizes = (512 // ranks, 256 // ranks, 256 // ranks)
        linear.place(Share(sizes, 256, 256, rank, ranks), torch.device("cpu"), came.append)
        passed = dict(checkpoint.sorted_out([("model.norm.weight", torch.ones(1)), *made.items()]))
        assert passed.keys() == {"model.norm.weight"} and not linear.begun and len(came) == 1
        want = torch.cat(
            [values[name][rank * n : (rank + 1) * n] for name, n in zip((Q, K, V), sizes, strict=True)]
        ).float()
        assert torch.equal(dequantised(linear.pieces(came[0])), want)


@pytest.mark.parametrize(
    ("kind", "count"), [("nvfp4 parts", 3), ("nvfp4 modelopt", 1), ("fp8 tensor", 1), ("fp8 rows", 1)]
)
def test_parts_are_joined_where_nothing_is_rounded_for_it(kind: str, count: int, tmp_path: Path) -> None:
    made, values = quantised(kind, weights())
    checkpoint, came = QuantisedCheckpoint.open(save(tmp_path / "c", kind, made)), []
    linear = QuantisedLinear(checkpoint, QKV, checkpoint.of_linear(QKV, (Q, K, V)))
    linear.place(Share((256, 128, 128), 256, 256), torch.device("cpu"), came.append)
    list(checkpoint.sorted_out(made.items()))
    pieces = linear.pieces(came[0])
    assert len(pieces) == count and torch.equal(dequantised(pieces), torch.cat([*values.values()]).float())


def test_blocks_that_end_within_a_part_stay_parts(tmp_path: Path) -> None:
    made, values = quantised("fp8 blocks", weights((200, 128, 40)))
    checkpoint, came = QuantisedCheckpoint.open(save(tmp_path / "c", "fp8 blocks", made)), []
    linear = QuantisedLinear(checkpoint, QKV, checkpoint.of_linear(QKV, (Q, K, V)))
    linear.place(Share((200, 128, 40), 256, 256), torch.device("cpu"), came.append)
    list(checkpoint.sorted_out(made.items()))
    pieces = linear.pieces(came[0])
    assert [p.shape[0] for p in pieces] == [200, 168]
    assert torch.equal(dequantised(pieces), torch.cat([*values.values()]).float())
    x, bias = torch.randn(5, 256).bfloat16(), torch.randn(368).bfloat16()
    base = EmulatedBlockFP8(torch.empty(0), ready=pieces)
    want = x.double() @ dequantised(pieces).double().t() + bias.double()
    assert torch.allclose(EmulatedBlockW8A16.of(base).matmul(x, bias).double(), want, rtol=2**-8, atol=1e-3)
    low = quantize_activations(x).dequantize(torch.float64) @ dequantised(pieces).double().t()
    assert torch.allclose(base.matmul(x, None).double(), low, rtol=2**-8, atol=1e-3)


def test_a_share_that_cuts_a_block_is_refused_by_name(tmp_path: Path) -> None:
    made, _ = quantised("fp8 blocks", weights((256, 128, 128)))
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", "fp8 blocks", made))
    linear = QuantisedLinear(checkpoint, QKV, checkpoint.of_linear(QKV, (Q, K, V)))
    with pytest.raises(MixQuantError, match=r"qkv_proj: part 1 on rank 1 of 2 has the rows 64 to 128 .* cut a block"):
        linear.place(Share((128, 64, 64), 256, 256, 1, 2), torch.device("cpu"), lambda _: None)
    assert "K = 704 is not a multiple of 128" in str(registry.refusal("fp8", "emulated", 384, 704, form="blocks"))


def test_what_has_to_be_bf16_is_multiplied_out(tmp_path: Path) -> None:
    made, values = quantised("fp8 blocks", {**weights(), "lm_head": torch.randn(130, 200).bfloat16()})
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", "fp8 blocks", made))
    checkpoint.keep(QKV, (Q, K, V), "by rule")
    passed = dict(checkpoint.sorted_out(made.items()))
    assert passed.keys() == {f"{name}.weight" for name in values}
    assert all(torch.equal(passed[f"{name}.weight"], value) for name, value in values.items())
    assert checkpoint.kept == {Q: "by rule", K: "by rule", V: "by rule", "lm_head": "never quantised"}


BROKEN: dict[str, tuple[str, Any, str]] = {
    "no scales": ("fp8 rows", lambda t: t.pop(f"{Q}.weight_scale"), "q_proj: weight_scale is missing"),
    "scales of another shape": (
        "fp8 rows",
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(7, 1)}),
        "neither one number nor one for each of 256 rows",
    ),
    "blocks of another shape": (
        "fp8 blocks",
        lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(4, 4)}),
        r"weight_scale_inv is \[4, 4\], not \[2, 2\]",
    ),
    "an unknown tensor": (
        "fp8 rows",
        lambda t: t.update({f"{Q}.g_idx": torch.ones(1)}),
        "g_idx is no tensor of compressed",
    ),
    "other codes": (
        "fp8 rows",
        lambda t: t.update({f"{Q}.weight": torch.zeros(256, 256, dtype=torch.int8)}),
        "q_proj.weight is I8; quantised are FP8 weights alone",
    ),
    "no codes": ("nvfp4 parts", lambda t: [t.pop(n) for n in [*t] if n.endswith("packed")], "holds no NVFP4 weight"),
}


@pytest.mark.parametrize("label", BROKEN)
def test_broken_checkpoints_are_refused(label: str, tmp_path: Path) -> None:
    kind, edit, message = BROKEN[label]
    made, _ = quantised(kind, weights())
    edit(made)
    with pytest.raises(MixQuantError, match=message):
        QuantisedCheckpoint.open(save(tmp_path / "c", kind, made))


def test_some_parts_of_a_linear_and_experts_are_refused(tmp_path: Path) -> None:
    made, _ = quantised("fp8 rows", {Q: weights()[Q], "model.layers.0.mlp.experts.0.up_proj": weights()[Q]})
    made |= {f"{name}.weight": weights()[name] for name in (K, V)}
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", "fp8 rows", made))
    with pytest.raises(MixQuantError, match=r"q_proj is quantised, but .*k_proj is not, and .*qkv_proj is one GEMM"):
        checkpoint.of_linear(QKV, (Q, K, V))
    with pytest.raises(
        MixQuantError, match=r"experts.0.up_proj is quantised; experts of quantised checkpoints are not"
    ):
        checkpoint.check_experts("model.layers.0.mlp.experts")
    with pytest.raises(MixQuantError, match="belongs to no layer of this model"):
        checkpoint.check_all_asked([Q], 4)


SAYS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq"}, "quant_method is 'gptq'; known"),
    "awq": ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'; known"),
    "ints": ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "format is 'int-quantized'; known"),
    "small blocks": ({**CONFIGS["fp8 blocks"], "weight_block_size": [64, 64]}, r"is \[64, 64\]; known: \[128, 128\]"),
    "rotated": ({**CONFIGS["nvfp4 parts"], "transform_config": {"a": 1}}, "transform_config: its linears take inputs"),
    "sparse": ({**CONFIGS["fp8 rows"], "sparsity_config": {"format": "sparse-24"}}, "sparsity_config: format is"),
    "groups": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "group"}}},
        },
        r"strategies \['group'\]",
    ),
}


@pytest.mark.parametrize("label", SAYS)
def test_formats_that_no_recipe_takes(label: str) -> None:
    config, message = SAYS[label]
    with pytest.raises(MixQuantError, match=message):
        family("config.json", config)


def test_the_config_may_stand_in_three_places(tmp_path: Path) -> None:
    assert said({"text_config": {"quantization_config": {"a": 1}}}, None) == ("quantization_config", {"a": 1})
    assert said({"compression_config": {"a": 1}}, None) == ("compression_config", {"a": 1})
    assert said({}, tmp_path) is None
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    where, found = said({}, tmp_path) or ("", {})
    assert family(where, found).recipe == "fp8-compact" and where == "hf_quant_config.json"


@pytest.mark.parametrize(("name", "dtype"), [(f"{Q}.weight_packed", "U8"), (Q, "torch.float8_e4m3fn"), (Q, "F8_E4M3")])
def test_a_checkpoint_whose_config_says_nothing(name: str, dtype: str) -> None:
    with pytest.raises(MixQuantError, match=r"q_proj\S* \(.*\) is part of a quantised weight, but neither"):
        check_said("folder", name, dtype)
    check_said("folder", f"{Q}.weight", "BF16")
    check_said("folder", "mask", "torch.uint8")


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
SHAPES: dict[str, tuple[Any, str]] = {
    "a list": ([1], "quantization_config has to be a JSON object, not [1]"),
    "an empty list": ([], "quantization_config has to be a JSON object, not []"),
    "a string": ("fp8", 'quantization_config has to be a JSON object, not "fp8"'),
    "groups a list": ({**COMPRESSED, "config_groups": [{}]}, "config_groups has to be a JSON object, not [{}]"),
    "groups a string": ({**COMPRESSED, "config_groups": "all"}, 'config_groups has to be a JSON object, not "all"'),
    "a group null": ({**COMPRESSED, "config_groups": {"g": None}}, "g has weights with num_bits None, not 8"),
    "a group a list": ({**COMPRESSED, "config_groups": {"g": [1]}}, "config_groups: g has to be a JSON object"),
    "weights a string": ({**COMPRESSED, "config_groups": {"g": {"weights": "8"}}}, "g: weights has to be a JSON"),
    "a strategy a list": (
        {**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": ["group"]}}}},
        "weights have the strategies",
    ),
    "targets a string": ({**COMPRESSED, "config_groups": {"g": {"targets": "Linear"}}}, "g: targets has to be a list"),
    "ignore a string": ({**COMPRESSED, "ignore": "lm_head"}, 'ignore has to be a list of strings, not "lm_head"'),
    "ignore of numbers": ({**COMPRESSED, "ignore": [1]}, "ignore has to be a list of strings, not [1]"),
    "a format a list": ({**COMPRESSED, "format": ["float-quantized"]}, "format is ['float-quantized']; known"),
    "sparsity a list": ({**COMPRESSED, "sparsity_config": [1]}, "sparsity_config has to be a JSON object, not [1]"),
    "an algorithm a list": ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, "quant_algo is ['FP8']; known"),
    "blocks a number": ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128; known: [128"),
    "no blocks": ({"quant_method": "fp8", "weight_block_size": []}, "weight_block_size is []; known: [128"),
    "a method a list": ({"quant_method": ["fp8"]}, "quant_method is \"['fp8']\"; known"),
}


@pytest.mark.parametrize("label", SHAPES)
def test_a_config_of_another_shape_ends_in_a_line_that_names_the_file(
    label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``plan``, and what a server and the doctor open; the text model's and compression_config's are the same."""
    says, message = SHAPES[label]
    model = {"model_type": "qwen3", "num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64}
    save(tmp_path, "fp8 rows", weights())
    for config in (
        {**model, "quantization_config": says},
        {**model, "compression_config": says},
        {"text_config": {**model, "quantization_config": says}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        wanted = message if "compression_config" not in config else message.replace("quantization_", "compression_")
        assert cli.main(["plan", str(tmp_path), "--gpu", "H200", "--input-len", "99", "--recipe", "fp8-compact"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path}/config.json" in line and wanted in line
        with pytest.raises(MixQuantError) as caught:
            QuantisedCheckpoint.open(tmp_path)
        assert str(tmp_path) in str(caught.value) and wanted in str(caught.value)
        with pytest.raises(MixQuantError) as caught:
            layouts.detect(Source.open(tmp_path))
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"quantization": []}', '{"quantization": "FP8"}', '{"quantization": null}']
)
def test_a_file_of_modelopt_of_another_shape_is_named(text: str, tmp_path: Path) -> None:
    save(tmp_path, "fp8 rows", weights())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(MixQuantError, match=r"hf_quant_config\.json: .*(JSON|says nothing)"):
        QuantisedCheckpoint.open(tmp_path)


def test_updates_that_are_refused(tmp_path: Path) -> None:
    made, _ = quantised("fp8 rows", weights())
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", "fp8 rows", made))
    known = Known({n: (tuple(t.shape), t.dtype) for n, t in made.items()}, quantised=checkpoint)
    cpu, name = torch.device("cpu"), f"{Q}.weight"
    nan = made[name].clone()
    nan.view(torch.uint8)[3, 3] = 0xFF
    assert known.problem(name, made[name], cpu) is None
    assert "holds NaN" in str(known.problem(name, nan, cpu))
    assert "is torch.bfloat16, not torch.float8_e4m3fn" in str(known.problem(name, weights()[Q], cpu))
    assert "negative" in str(known.problem(f"{Q}.weight_scale", -made[f"{Q}.weight_scale"], cpu))


@pytest.mark.parametrize(("kind", "leaf"), [("nvfp4 parts", "input_global_scale"), ("fp8 tensor", "k_scale")])
def test_updates_need_no_tensor_that_is_not_used(kind: str, leaf: str, tmp_path: Path) -> None:
    made, _ = quantised(kind, weights())
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", kind, made))
    known = Known({n: (tuple(t.shape), t.dtype) for n, t in made.items()}, quantised=checkpoint)
    name, cpu = f"{K}.{leaf}", torch.device("cpu")
    assert name in made and known.missing(made.keys() - {name}) is None
    for found in (torch.full_like(made[name], float("nan")), torch.ones(3), torch.zeros(1, dtype=torch.int8)):
        assert known.problem(name, found, cpu) is None
    assert name not in dict(checkpoint.sorted_out([(name, torch.ones(1))]))
    assert str(known.missing(made.keys() - {f"{K}.weight_scale"})) == f"{K}.weight_scale is missing"
    assert "is no tensor of this model's" in str(known.problem(f"{K}.other", torch.ones(1), cpu))


@pytest.mark.parametrize("cut", [True, False])
def test_a_session_that_brings_parts_of_what_is_multiplied_out_is_told(
    cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its BF16 weight stays the old one beside new ones, and the next session's scales meet these codes."""
    run = Runtime(asked := load("fp8-compact"), select(asked, Device("this CPU", None)))
    monkeypatch.setattr(runtime, "_runtime", run)
    made, _ = quantised("fp8 rows", {Q: weights()[Q]})
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "made", "fp8 rows", made))
    checkpoint.keep(Q, (), "by rule")
    run.use_quantised(checkpoint)
    updater = SimpleNamespace(get_model_runner=lambda: SimpleNamespace(is_draft_worker=False))
    codes, scales = f"{Q}.weight", f"{Q}.weight_scale"
    update.weights_begin(updater)
    assert not [*run.loaders_see([(codes, made[codes])])]
    assert cut or [*run.loaders_see([(scales, made[scales])])]
    update.weights_end(None, updater)
    assert run.weights.current is not cut and checkpoint.begun is None
    update.weights_begin(updater)
    assert not [*run.loaders_see([(scales, made[scales])])]  # not with codes of the session before
    ((name, weight),) = run.loaders_see([(codes, made[codes])])
    update.weights_end(None, updater)
    assert run.weights.current and name == codes and weight.dtype is torch.bfloat16


def test_tensor_scales_that_were_joined_stay_equal(tmp_path: Path) -> None:
    made, _ = quantised("nvfp4 modelopt", weights())
    checkpoint, came = QuantisedCheckpoint.open(save(tmp_path / "c", "nvfp4 modelopt", made)), []
    linear = QuantisedLinear(checkpoint, QKV, checkpoint.of_linear(QKV, (Q, K, V)))
    linear.place(Share((256, 128, 128), 256, 256), torch.device("cpu"), came.append)
    list(checkpoint.sorted_out(made.items()))
    linear.pieces(came[0])
    assert checkpoint.differing(made) is None
    made[f"{K}.weight_scale_2"] = made[f"{K}.weight_scale_2"] * 2
    assert "with which it was loaded as one" in str(checkpoint.differing(made))
    list(checkpoint.sorted_out(made.items()))
    with pytest.raises(ValueError, match=r"tensor scales of .*qkv_proj's parts differ"):
        linear.pieces(came[1])


def test_scales_that_were_equal_at_load_are_so_in_an_update_of_the_same_checkpoint(tmp_path: Path) -> None:
    """compressed-tensors stores reciprocals, and those of two neighbours may be one number."""
    made, _ = quantised("nvfp4 parts", weights())
    for name, bits in ((Q, 0x3FFFFFFF), (K, 0x3FFFFFFE), (V, 0x3FFFFFFF)):
        made[f"{name}.weight_global_scale"] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    checkpoint, came = QuantisedCheckpoint.open(save(tmp_path / "c", "nvfp4 parts", made)), []
    linear = QuantisedLinear(checkpoint, QKV, checkpoint.of_linear(QKV, (Q, K, V)))
    linear.place(Share((256, 128, 128), 256, 256), torch.device("cpu"), came.append)
    list(checkpoint.sorted_out(made.items()))
    assert len(linear.pieces(came[0])) == 1
    assert checkpoint.differing(made) is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_pieces_are_of_their_format(kind: str, tmp_path: Path) -> None:
    made, _ = quantised(kind, weights())
    checkpoint = QuantisedCheckpoint.open(save(tmp_path / "c", kind, made))
    kinds = checkpoint.modules[Q]
    found = piece(Q, kinds, {leaf: made[f"{Q}.{leaf}"] for leaf in kinds.leaves})
    wanted = NVFP4Tensor if kind.startswith("nvfp4") else FP8Blocks if kind == "fp8 blocks" else FP8Tensor
    assert type(found) is wanted


def test_the_doctor_names_a_config_at_whose_shape_transformers_fails(tmp_path: Path) -> None:
    launch = pytest.importorskip("mixquant_sglang.tools.launch")
    for config, message in (('{"quantization_config": [1]}', "has to be a JSON object, not [1]"), ("{}", "")):
        (tmp_path / "config.json").write_text(config)
        found = launch._misshapen(["--tp", "1", "--model-path", str(tmp_path), "--device", "cpu"])
        assert message in found and found.startswith(str(tmp_path / "config.json") if message else "")
        assert bool(found) is bool(message)
