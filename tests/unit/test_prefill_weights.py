"""Ready-made prefill weights: what is read from either convention, which slices a rank gets, and what is refused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.kernels.linear.emulated_fp8 import EmulatedFP8
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.weights import hub
from mixquant_sglang.weights.ready_made import ReadyMadeWeights
from mixquant_sglang.weights.ready_made_linear import Share
from tests.support import nvfp4_checkpoints as tiny
from tests.support.nvfp4_checkpoints import CONFIG, HIDDEN, INNER, LINEARS, MODELOPT, Tensors, bf16_tensors, save

WHERE = "mine.yaml:3 prefill.weights"
FUSED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": (),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": (),
}


def shards_of(name: str) -> tuple[str, ...]:
    parent = name.rpartition(".")[0]
    return tuple(f"{parent}.{shard}" for shard in FUSED[name.split(".", 3)[3]])


def master(made: Tensors, name: str) -> torch.Tensor:
    return torch.cat([made[f"{shard}.weight"] for shard in shards_of(name) or (name,)])


def take(weights: ReadyMadeWeights, made: Tensors, name: str, share: Share | None = None) -> list[NVFP4Tensor]:
    """The whole linear, or a share of it."""
    linear = weights.linear(name, shards_of(name))
    assert linear is not None
    whole = master(made, name)
    if share is None:
        share = Share(tuple(made[f"{s}.weight"].shape[0] for s in shards_of(name) or (name,)), *[whole.shape[1]] * 2)
        linear.place(share)
        return linear.load(whole, check=True)
    linear.place(share)
    return linear.load(slice_of(made, name, share), check=True)


def slice_of(made: Tensors, name: str, share: Share) -> torch.Tensor:
    """Like SGLang's weight loaders, of BF16 weights or of dequantised ones."""
    if share.k != share.full_k:
        return made[f"{name}.weight"][:, share.rank * share.k : (share.rank + 1) * share.k]
    parts = []
    for part, (module, n) in enumerate(zip(shards_of(name) or (name,), share.sizes, strict=True)):
        at = (share.rank // share.kv_replicas if part else share.rank) * n
        parts.append(made[f"{module}.weight"][at : at + n])
    return torch.cat(parts)


def dequantized(pieces: list[NVFP4Tensor]) -> torch.Tensor:
    return torch.cat([piece.dequantize(torch.float32) for piece in pieces])


def opened(folder: Path) -> ReadyMadeWeights:
    return ReadyMadeWeights.open(str(folder), WHERE)


# What is read


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("scales", nvfp4.SCALE_MODES)
def test_our_own_checkpoint_gives_the_bytes_of_packing(tmp_path: Path, shards: int, scales: str) -> None:
    made = bf16_tensors()
    quantize_checkpoint(save(tmp_path / "bf16", made, CONFIG, shards), tmp_path / "ready", scales=scales)
    weights = opened(tmp_path / "ready")
    x = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    for layer in range(tiny.LAYERS):
        for leaf in FUSED:
            name = f"model.layers.{layer}.{leaf}"
            whole = master(made, name)
            (piece,) = take(weights, made, name)  # mixquant quantize gives fused parts one scale
            packed = nvfp4.quantize(whole, scales=scales, tensor_scale=piece.tensor_scale)
            assert torch.equal(piece.packed, packed.packed)
            assert torch.equal(piece.block_scales.view(torch.uint8), packed.block_scales.view(torch.uint8))
            usual = nvfp4.quantize(whole, scales=scales).tensor_scale
            assert torch.allclose(piece.tensor_scale, usual, rtol=2**-22, atol=0)
            if whole.shape[1] == HIDDEN and torch.equal(piece.tensor_scale, usual):
                kernels = EmulatedNVFP4(whole, scales=scales, ready=[piece]), EmulatedNVFP4(whole, scales=scales)
                assert torch.equal(*(kernel.matmul(x, None) for kernel in kernels))
    weights.check_all_taken()
    assert weights.unused == {}


def test_compressed_tensors_own_compressor(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's, which has an invalid escape in a docstring
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    made = bf16_tensors()
    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    ready: Tensors = {name: value for name, value in made.items() if name.removesuffix(".weight") not in LINEARS}
    theirs: Tensors = {}
    for name in LINEARS:
        weight = made[f"{name}.weight"]
        g = generate_gparam(weight.min(), weight.max()).reshape(1)
        low, high = weight.view(weight.shape[0], -1, 16).aminmax(dim=-1)
        scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=g)
        state = compressor.compress({"weight": weight, "weight_scale": scale, "weight_global_scale": g}, scheme)
        ready |= {f"{name}.{key}": value.data.contiguous() for key, value in state.items()}
        theirs[name] = compressor.decompress(dict(state), scheme)["weight"]
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="nvfp4-pack-quantized", ignore=["lm_head"])
    quantization = json.loads(config.model_dump_json())
    weights = opened(save(tmp_path / "ready", ready, {**CONFIG, "quantization_config": quantization}))
    for layer in range(tiny.LAYERS):
        for leaf in FUSED:
            name = f"model.layers.{layer}.{leaf}"
            expected = torch.cat([theirs[shard] for shard in shards_of(name) or (name,)])
            # they round a block scale times the global one on the way
            ours = dequantized(take(weights, made, name))
            assert torch.allclose(ours, expected.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_modelopt(tmp_path: Path, in_a_file: bool) -> None:
    made = bf16_tensors()
    folder = save(tmp_path / "ready", tiny.modelopt(made), CONFIG if in_a_file else MODELOPT, shards=2)
    if in_a_file:
        (folder / "hf_quant_config.json").write_text(json.dumps(tiny.MODELOPT_FILE))
    weights = opened(folder)
    assert weights.layout.name == "ModelOpt"
    for name in ("model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        (piece,) = take(weights, made, name)
        packed = nvfp4.quantize(made[f"{name}.weight"])
        assert torch.equal(piece.dequantize(), packed.dequantize())


@pytest.mark.parametrize("convention", ["compressed-tensors", "ModelOpt"])
def test_parts_with_scales_of_their_own_are_exact(tmp_path: Path, convention: str) -> None:
    made = bf16_tensors()
    if convention == "ModelOpt":
        folder = save(tmp_path / "ready", tiny.modelopt(made), MODELOPT)
    else:
        folder = save(tmp_path / "ready", *tiny.compressed_tensors(made))
    name = "model.layers.0.self_attn.qkv_proj"
    pieces = take(opened(folder), made, name)
    assert len(pieces) == 3 and len({float(piece.tensor_scale) for piece in pieces}) == 3
    weight = master(made, name)
    torch.manual_seed(0)
    kernel = EmulatedNVFP4(weight, ready=pieces)
    assert kernel.nbytes == sum(piece.nbytes for piece in pieces)
    x = nvfp4.quantize_activations(torch.randn(9, HIDDEN, dtype=torch.bfloat16)).dequantize()
    bias = torch.randn(128, dtype=torch.bfloat16)
    values = torch.cat([p.unscaled(torch.float64) * p.tensor_scale.double() for p in pieces])
    expected = (x.double() @ values.T).bfloat16()
    assert torch.equal(kernel.matmul(x, None), expected)
    assert torch.equal(kernel.matmul(x, bias), expected + bias)
    separate = [EmulatedNVFP4(weight, ready=[piece]) for piece in pieces]
    for part, piece in zip(separate, pieces, strict=True):
        part._n = piece.shape[0]
    assert torch.equal(kernel.matmul(x, None), torch.cat([part.matmul(x, None) for part in separate], dim=1))


@pytest.mark.gpu
def test_parts_on_a_gpu(tmp_path: Path) -> None:
    made = {name: value.cuda() for name, value in bf16_tensors().items()}
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(bf16_tensors()))
    name = "model.layers.0.self_attn.qkv_proj"
    pieces = take(opened(folder), made, name)
    kernel = EmulatedNVFP4(master(made, name), ready=pieces)
    x = nvfp4.quantize_activations(torch.randn(33, HIDDEN, dtype=torch.bfloat16, device="cuda")).dequantize()
    values = torch.cat([p.unscaled(torch.float64) * p.tensor_scale.double() for p in pieces])
    assert torch.allclose(kernel.matmul(x, None).double(), x.double() @ values.T, rtol=2**-8, atol=1e-5)


def test_neighbours_with_one_scale_take_one_gemm(tmp_path: Path) -> None:
    made = bf16_tensors()
    for layer in range(tiny.LAYERS):
        made[f"model.layers.{layer}.self_attn.v_proj.weight"] = made[f"model.layers.{layer}.self_attn.k_proj.weight"]
    folder = save(tmp_path / "ready", {k: v.clone() for k, v in tiny.modelopt(made).items()}, MODELOPT)
    pieces = take(opened(folder), made, "model.layers.0.self_attn.qkv_proj")
    assert [piece.shape[0] for piece in pieces] == [HIDDEN, 64]


def test_replacing_keeps_addresses() -> None:
    weight = torch.cat([torch.randn(n, 32).bfloat16() * n for n in (16, 48)])
    pieces = [nvfp4.quantize(part) for part in weight.split([16, 48])]
    kernel = EmulatedNVFP4(weight, ready=pieces)
    before, x = [t.data_ptr() for t in kernel.tensors()], torch.randn(3, 32, dtype=torch.bfloat16)
    expected = kernel.matmul(x, None)
    for tensor in kernel.tensors():
        tensor.fill_(0)
    kernel.replace([nvfp4.quantize(part) for part in weight.split([16, 48])])
    assert [t.data_ptr() for t in kernel.tensors()] == before
    assert torch.equal(kernel.matmul(x, None), expected)


def test_fp8_takes_none() -> None:
    weight = torch.randn(16, 32).bfloat16()
    with pytest.raises(ValueError, match="ready-made weights are NVFP4; this is fp8"):
        EmulatedFP8(weight, ready=[nvfp4.quantize(weight)])
    with pytest.raises(ValueError, match="ready-made weights are NVFP4; this is fp8"):
        EmulatedFP8(weight).replace([nvfp4.quantize(weight)])


# Tensor parallel


def share(name: str, ranks: int, rank: int) -> Share:
    """What SGLang's layer of this model says; two key and value heads of 16."""
    leaf = name.rpartition(".")[2]
    if leaf in ("o_proj", "down_proj"):
        k = HIDDEN if leaf == "o_proj" else INNER
        return Share((HIDDEN,), k // ranks, k, rank, ranks)
    if leaf == "gate_up_proj":
        return Share((INNER // ranks, INNER // ranks), HIDDEN, HIDDEN, rank, ranks)
    replicas = max(ranks // 2, 1)
    return Share((HIDDEN // ranks, *[32 * replicas // ranks] * 2), HIDDEN, HIDDEN, rank, ranks, replicas)


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("leaf", FUSED)
def test_the_slices_of_a_rank(tmp_path: Path, leaf: str, ranks: int, rank: int) -> None:
    if ranks == 4 and leaf == "mlp.down_proj":
        pytest.skip("96 / 4 is not a multiple of 16, so the layer stays BF16")
    made, name = bf16_tensors(), f"model.layers.1.{leaf}"
    ready, config = tiny.compressed_tensors(made)
    weights = opened(save(tmp_path / "ready", ready, config, shards=2))
    values: Tensors = {}
    for module in shards_of(name) or (name,):
        packed, scales, g = (ready[f"{module}.weight_{key}"] for key in ("packed", "scale", "global_scale"))
        values[f"{module}.weight"] = NVFP4Tensor(packed, scales, 1 / g[0]).dequantize(torch.float32)
    mine = share(name, ranks, rank)
    pieces = take(weights, made, name, mine)
    assert torch.equal(dequantized(pieces), slice_of(values, name, mine))
    assert all(piece.packed.is_contiguous() and piece.block_scales.is_contiguous() for piece in pieces)


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1), (4, 3)])
def test_parts_that_the_checkpoint_fuses_too(tmp_path: Path, ranks: int, rank: int) -> None:
    made, name = bf16_tensors(), "model.layers.0.self_attn.qkv_proj"
    fused = {f"{name}.weight": master(made, name)}
    ready, config = tiny.compressed_tensors(fused, [name])
    weights = opened(save(tmp_path / "ready", ready, config))
    mine = share(name, ranks, rank)
    (piece,) = take(weights, made, name, mine)
    packed = nvfp4.quantize(fused[f"{name}.weight"], tensor_scale=piece.tensor_scale).dequantize()
    whole = {f"{s}.weight": v for s, v in zip(shards_of(name), packed.split([HIDDEN, 32, 32]), strict=True)}
    assert torch.equal(piece.dequantize(), slice_of(whole, name, mine))


# What stays BF16


def test_layers_that_the_checkpoint_keeps(tmp_path: Path) -> None:
    made = bf16_tensors()
    kept = "model.layers.0.mlp.down_proj"
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(made, [n for n in LINEARS if n != kept]))
    assert opened(folder).linear(kept, ()) is None


def test_what_no_linear_takes(tmp_path: Path) -> None:
    made = bf16_tensors()
    extra = ["lm_head", "model.layers.2.mlp.experts.3.up_proj", "model.layers.2.self_attn.q_proj", "mtp.layers.0.q"]
    for name in extra:
        made.setdefault(f"{name}.weight", torch.randn(16, 32).bfloat16())
    weights = opened(save(tmp_path / "ready", *tiny.compressed_tensors(made, [*LINEARS[:-1], *extra])))
    for name in FUSED:
        if name != "mlp.down_proj":
            weights.linear(f"model.layers.0.{name}", shards_of(f"model.layers.0.{name}"))
        else:
            weights.keep(f"model.layers.0.{name}", (), "by rule of the recipe")
        if name not in ("mlp.gate_up_proj", "mlp.down_proj"):
            weights.linear(f"model.layers.1.{name}", shards_of(f"model.layers.1.{name}"))
    weights.keep("model.layers.1.mlp.down_proj", (), "by rule of the recipe")  # and is not quantised there
    with pytest.raises(MixQuantError, match=r"mlp\.(gate|up)_proj\.weight_packed belongs to no layer of this model"):
        weights.check_all_taken()
    weights.linear("model.layers.1.mlp.gate_up_proj", shards_of("model.layers.1.mlp.gate_up_proj"))
    weights.check_all_taken()
    assert weights.unused == {
        "model.layers.0.mlp.down_proj": "by rule of the recipe",
        **dict.fromkeys(extra, "never quantised"),
    }


def test_updates_are_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = opened(save(tmp_path / "ready", *tiny.compressed_tensors(bf16_tensors())))
    with caplog.at_level(logging.WARNING):
        weights.warn_updated()
        weights.warn_updated()
    (record,) = caplog.records
    assert f"no longer prefill with the ready-made weights of {weights.folder}, but" in record.getMessage()


# What is refused

Q0, O1, DOWN0 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def do(ready: Tensors) -> None:
        ready[name] = change(ready[name].clone())

    return do


def byte(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def do(scales: torch.Tensor) -> torch.Tensor:
        scales.view(torch.uint8)[3, 1] = value
        return scales

    return do


def unquantise(ready: Tensors) -> None:
    for key in ("packed", "scale", "global_scale"):
        del ready[f"{Q0}.weight_{key}"]
    ready[f"{Q0}.weight"] = bf16_tensors()[f"{Q0}.weight"]


BROKEN: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no codes": (lambda t: t.pop(f"{Q0}.weight_packed"), rf"{Q0}\.weight_packed is missing"),
    "no scales": (lambda t: t.pop(f"{O1}.weight_scale"), rf"{O1}\.weight_scale is missing"),
    "no tensor scale": (lambda t: t.pop(f"{O1}.weight_global_scale"), rf"{O1}\.weight_global_scale is missing"),
    "nothing of a linear": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(DOWN0)],
        rf"{DOWN0}\.weight_packed is missing",
    ),
    "a part in BF16": (
        unquantise,
        rf"model\.safetensors: {Q0}\.weight is BF16, but .*k_proj is NVFP4.*qkv_proj in BF16",
    ),
    "a part in FP8": (
        lambda t: (unquantise(t), t.update({f"{Q0}.weight": t[f"{Q0}.weight"].to(torch.float8_e4m3fn)})),
        rf"{Q0}\.weight is F8_E4M3",
    ),
    "smoothed": (
        lambda t: t.update({f"{O1}.pre_quant_scale": torch.ones(4)}),
        rf"model\.safetensors: {O1}\.pre_quant_scale is no tensor of compressed-tensors's NVFP4; weights that were",
    ),
    "another tensor": (lambda t: t.update({f"{O1}.weight_g_idx": torch.ones(4)}), rf"{O1}\.weight_g_idx is no tensor"),
    "fewer rows": (
        edit(f"{O1}.weight_packed", lambda x: x[:-1].clone()),
        rf"{O1}\.weight_packed is U8 \[63, 32\]; the BF16 checkpoint needs U8 \[64, 32\]",
    ),
    "blocks of 32": (
        edit(f"{DOWN0}.weight_scale", lambda x: x[:, ::2].contiguous()),
        rf"{DOWN0}\.weight_scale is F8_E4M3 \[64, 3\]; the BF16 checkpoint needs F8_E4M3 \[64, 6\]",
    ),
    "scales of another type": (edit(f"{O1}.weight_scale", lambda x: x.to(torch.bfloat16)), r"weight_scale is BF16"),
    "codes of another type": (edit(f"{O1}.weight_packed", lambda x: x.view(torch.int8)), r"weight_packed is I8"),
    "a tensor scale for each row": (
        edit(f"{O1}.weight_global_scale", lambda x: x.expand(64).contiguous()),
        r"weight_global_scale is F32 \[64\]; .* needs F32 with one number",
    ),
    "NaN block scale": (edit(f"{O1}.weight_scale", byte(0x7F)), rf"{O1}\.weight_scale holds negative or NaN"),
    "negative block scale": (edit(f"{O1}.weight_scale", byte(0x81)), rf"{O1}\.weight_scale holds negative or NaN"),
    "NaN tensor scale": (edit(f"{O1}.weight_global_scale", lambda x: x * torch.nan), r"is nan, which is no scale"),
    "zero tensor scale": (edit(f"{O1}.weight_global_scale", lambda x: x * 0), r"global_scale is 0, which is no scale"),
    "negative tensor scale": (edit(f"{O1}.weight_global_scale", torch.neg), r"which is no scale"),
    "a decode scale": (edit(f"{O1}.weight_global_scale", torch.reciprocal), rf"{O1}\.weight_packed is not this weight"),
    "other weights": (
        edit(f"{DOWN0}.weight_packed", lambda x: x.flip(0)),
        rf"{DOWN0}\.weight_packed is not this weight of the BF16 checkpoint, rounded: .* it is 1\.\d\d of the weight.s",
    ),
    "zeros": (edit(f"{O1}.weight_packed", torch.zeros_like), r"it is 1\.00 of the weight.s norm away"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints(tmp_path: Path, change: Callable[[Tensors], Any], message: str) -> None:
    made = bf16_tensors()
    ready, config = tiny.compressed_tensors(made)
    change(ready)
    save(tmp_path / "ready", ready, config)

    def load() -> None:
        weights = opened(tmp_path / "ready")
        for layer in range(tiny.LAYERS):
            for leaf in FUSED:
                take(weights, made, f"model.layers.{layer}.{leaf}")

    with pytest.raises(MixQuantError, match=message) as caught:
        load()
    assert str(tmp_path / "ready") in str(caught.value) and len(str(caught.value).splitlines()) == 1


def groups(**weights: object) -> dict[str, Any]:
    config = tiny.compressed_tensors({}, [])[1]["quantization_config"]
    config["config_groups"]["group_0"]["weights"].update(weights)
    return config  # type: ignore[no-any-return]


FORMATS: dict[str, tuple[Any, str]] = {
    "none": (None, r"is not quantised \(no quantization_config\); allowed: compressed-tensors'"),
    "fp8": ({"quant_method": "fp8"}, r"config\.json: quant_method is 'fp8'; allowed:"),
    "mixed": ({**groups(), "format": "mixed-precision"}, "format is 'mixed-precision'; allowed"),
    "fp8 of compressed-tensors": ({**groups(), "format": "float-quantized"}, "format is 'float-quantized'"),
    "mxfp4": (groups(group_size=32), "group_0 has weights with group_size 32, not 16"),
    "int4": (groups(type="int"), "group_0 has weights with type 'int', not 'float'"),
    "rotated": ({**groups(), "transform_config": {"config_groups": {"R1": {}}}}, "transformed weights do not fit"),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo is 'FP8'; allowed"),
    "modelopt awq": ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'"),
    "modelopt's tensors are not there": (MODELOPT["quantization_config"], r"weight is missing|holds no ModelOpt"),
}


@pytest.mark.parametrize(("quantization", "message"), FORMATS.values(), ids=FORMATS)
def test_other_formats(tmp_path: Path, quantization: Any, message: str) -> None:
    ready, config = tiny.compressed_tensors(bf16_tensors())
    config["quantization_config"] = quantization
    with pytest.raises(MixQuantError, match=message) as caught:
        opened(save(tmp_path / "ready", ready, {k: v for k, v in config.items() if v is not None}))
    assert "\n" not in str(caught.value)


def test_weights_without_activation_scales_are_the_same(tmp_path: Path) -> None:
    ready, config = tiny.compressed_tensors(bf16_tensors())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None  # NVFP4A16
    ready = {name: value for name, value in ready.items() if not name.endswith("input_global_scale")}
    take(opened(save(tmp_path / "ready", ready, config)), bf16_tensors(), "model.layers.0.mlp.down_proj")


def test_another_model(tmp_path: Path) -> None:
    weights = opened(save(tmp_path / "ready", *tiny.compressed_tensors(bf16_tensors())))
    weights.check_model(SimpleNamespace(**CONFIG))
    weights.check_model(SimpleNamespace(text_config=SimpleNamespace(**CONFIG), hidden_size=1))
    for key, value in (("hidden_size", 128), ("model_type", "llama"), ("num_hidden_layers", 3), ("head_dim", 8)):
        with pytest.raises(MixQuantError, match=rf"config\.json: {key} is {CONFIG[key]}, but {value} in the BF16"):
            weights.check_model(SimpleNamespace(**{**CONFIG, key: value}))


def test_other_norms(tmp_path: Path) -> None:
    made = bf16_tensors()
    weights = opened(save(tmp_path / "ready", *tiny.compressed_tensors(made)))
    weights.check_norms(made.items())
    name = "model.layers.1.input_layernorm.weight"
    weights.check_norms([(name, torch.ones(3)), ("model.norm.weight", torch.ones(64))])
    with pytest.raises(MixQuantError, match=rf"model\.safetensors: {name} is not that of the BF16 checkpoint"):
        weights.check_norms([(name, made[name] * 1.01)])


def test_damaged_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(bf16_tensors()))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(MixQuantError, match=rf"^{WHERE}: .*model\.safetensors"):
        opened(folder)


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = save(tmp_path / "snapshot", *tiny.compressed_tensors(bf16_tensors()))
    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        if name == "org/none":
            raise OSError("404 Client Error.\nRepository Not Found")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.find.cache_clear()
    assert opened(Path("org/tiny-NVFP4")).folder == opened(Path("org/tiny-NVFP4")).folder == folder
    assert asked == ["org/tiny-NVFP4"]
    message = f"^{WHERE}: org/none: is no folder, and fetching it from the hub failed: 404 Client Error. Repository"
    with pytest.raises(MixQuantError, match=message):
        opened(Path("org/none"))
    hub.find.cache_clear()
