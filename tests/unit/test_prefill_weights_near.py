"""Ready-made prefill weights have to be the BF16 checkpoint's, rounded: which roundings are taken, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.weights.ready_made import ReadyMadeWeights
from mixquant_sglang.weights.ready_made_linear import Share
from tests.support import nvfp4_checkpoints as tiny
from tests.support.nvfp4_checkpoints import LINEARS, SHAPES, Tensors, bf16_tensors, save


def _away(share: float) -> Tensors:
    random = torch.Generator().manual_seed(5)
    out = bf16_tensors()
    for name in LINEARS:
        weight = out[f"{name}.weight"].float()
        out[f"{name}.weight"] = (weight + share * weight.std() * torch.randn(weight.shape, generator=random)).bfloat16()
    return out


def _accepts(folder: Path, ready: Tensors, config: dict[str, Any], rounding: str = "nearest") -> ReadyMadeWeights:
    made = bf16_tensors()
    weights = ReadyMadeWeights.open(str(save(folder, ready, config)), "here", rounding)
    for name in LINEARS:
        master = made[f"{name}.weight"]
        linear = weights.linear(name, ())
        assert linear is not None
        linear.place(Share((master.shape[0],), master.shape[1], master.shape[1]))
        linear.load(master, check=True)
    return weights


@pytest.mark.parametrize("scales", ["absmax", "search"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0, 64.0])
def test_roundings_of_the_same_weights_are_taken(tmp_path: Path, scales: str, factor: float) -> None:
    """Fused tensor scales are those of the largest part, calibrated ones may be smaller than the maximum asks for."""
    made = bf16_tensors()
    ready, config = tiny.compressed_tensors(made)
    for name in LINEARS:
        g = ready[f"{name}.weight_global_scale"] / factor
        packed = nvfp4.quantize(made[f"{name}.weight"], scales=scales, tensor_scale=1 / g[0])
        ready |= {f"{name}.weight_packed": packed.packed, f"{name}.weight_scale": packed.block_scales}
        ready[f"{name}.weight_global_scale"] = g
    _accepts(tmp_path, ready, config)


def test_weighted_scales_are_taken(tmp_path: Path) -> None:
    made = bf16_tensors()
    ready, config = tiny.compressed_tensors(made)
    for name in LINEARS:
        weight, g = made[f"{name}.weight"], ready[f"{name}.weight_global_scale"]
        importance = torch.linspace(0.01, 1, weight.shape[1]) ** 4
        packed = nvfp4.quantize(weight, scales="search", tensor_scale=1 / g[0], column_weights=importance)
        ready |= {f"{name}.weight_packed": packed.packed, f"{name}.weight_scale": packed.block_scales}
    _accepts(tmp_path, ready, config)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.2, 0.45])
@pytest.mark.parametrize("scales", ["absmax", "search"])
def test_another_fine_tune_is_refused(tmp_path: Path, share: float, scales: str) -> None:
    ready, config = tiny.compressed_tensors(_away(share), scales=scales)
    with pytest.raises(
        MixQuantError, match=r"q_proj\.weight_packed is not this weight of the BF16 checkpoint, rounded"
    ):
        _accepts(tmp_path, ready, config)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.4])
def test_a_wrong_tensor_scale_is_refused(tmp_path: Path, factor: float) -> None:
    ready, config = tiny.compressed_tensors(bf16_tensors())
    ready["model.layers.1.mlp.up_proj.weight_global_scale"] /= factor
    with pytest.raises(MixQuantError, match=r"layers\.1\.mlp\.up_proj\.weight_packed is not this weight"):
        _accepts(tmp_path, ready, config)


def test_one_row_of_another_weight_is_refused(tmp_path: Path) -> None:
    made = bf16_tensors()
    other = dict(made)
    other["model.layers.0.self_attn.o_proj.weight"] = made["model.layers.0.self_attn.o_proj.weight"].clone()
    other["model.layers.0.self_attn.o_proj.weight"][3] = made["model.layers.0.self_attn.o_proj.weight"][4]
    with pytest.raises(MixQuantError, match=r"o_proj\.weight_packed is not this weight"):
        _accepts(tmp_path, *tiny.compressed_tensors(other))


@pytest.mark.parametrize("factor", [0.94, 1.05, 1.2])
def test_a_wrong_tensor_scale_is_refused_where_any_rounding_is_taken(tmp_path: Path, factor: float) -> None:
    ready, config = tiny.fed_back(bf16_tensors())
    ready["model.layers.1.mlp.up_proj.weight_global_scale"] /= factor
    with pytest.raises(MixQuantError, match=r"layers\.1\.mlp\.up_proj\.weight_packed is not .* of its size \(allowed"):
        _accepts(tmp_path, ready, config, "any")


def test_scaled_rows_are_refused_where_any_rounding_is_taken(tmp_path: Path) -> None:
    """As smoothing leaves them: values that are scaled would go into a cache that BF16 decode reads."""
    made = bf16_tensors()
    name = "model.layers.0.self_attn.v_proj.weight"
    factor = torch.exp(0.15 * torch.randn(len(made[name]), 1, generator=torch.Generator().manual_seed(3)))
    other = made | {name: (made[name].float() * factor).bfloat16()}
    with pytest.raises(MixQuantError, match=r"v_proj\.weight_packed is not .*% of its rows are scaled"):
        _accepts(tmp_path, *tiny.fed_back(other), "any")


@pytest.mark.parametrize("how", ["smoothed", "rotated"])
def test_smoothed_and_rotated_weights_are_refused(tmp_path: Path, how: str) -> None:
    made = bf16_tensors()
    other = dict(made)
    for name in LINEARS:
        weight = made[f"{name}.weight"].float()
        k = weight.shape[1]
        factor = torch.linspace(0.7, 1.4, k).diag() if how == "smoothed" else _hadamard(k)
        other[f"{name}.weight"] = (weight @ factor).bfloat16()
    with pytest.raises(MixQuantError, match=r"q_proj\.weight_packed is not this weight"):
        _accepts(tmp_path, *tiny.compressed_tensors(other))


def _hadamard(k: int) -> torch.Tensor:
    """Blocks of 16."""
    block = torch.ones(1, 1)
    for _ in range(4):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) / 2**0.5
    return torch.block_diag(*[block] * (k // 16))


def test_codes_that_make_up_for_each_other_are_taken_where_any_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready, config = tiny.fed_back(bf16_tensors())
    with pytest.raises(MixQuantError, match=r"q_proj\.weight_packed is not .*'rounding: any' beside prefill"):
        _accepts(tmp_path / "nearest", ready, config)
    weights = _accepts(tmp_path / "any", ready, config, "any")
    with caplog.at_level("INFO"):
        weights.say_rounding()
    found = re.search(r"process holds ([\d.]+)% are .* are ([\d.]+) of the norm .* farthest is model", caplog.text)
    assert found and 5 < float(found[1]) < 60 and 0.085 < float(found[2]) < 0.2, caplog.text


def test_the_nearest_say_nothing_of_their_rounding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _accepts(tmp_path, *tiny.compressed_tensors(bf16_tensors())).say_rounding()
    assert not caplog.text


def test_another_model_is_refused_where_any_rounding_is_taken(tmp_path: Path) -> None:
    with pytest.raises(MixQuantError, match=r"it is 0\.4\d of the weight's norm away \(allowed: 0\.25\)"):
        _accepts(tmp_path, *tiny.compressed_tensors(_away(0.45), scales="search"), "any")


def test_other_codes_are_other_weights(tmp_path: Path) -> None:
    """Scales and shapes are the same: two checkpoints whose numbers differ must not pass for one."""
    plain = tiny.compressed_tensors(bf16_tensors(), scales="search")
    fed = tiny.fed_back(bf16_tensors())
    found = [
        ReadyMadeWeights.open(str(save(tmp_path / name, *made)), "here", "any").identity()
        for name, made in (("plain", plain), ("fed", fed), ("again", fed))
    ]
    assert found[0] != found[1] == found[2]


@pytest.mark.slow
def test_a_flipped_bit_in_a_header_is_one_line(tmp_path: Path) -> None:
    """Each is refused with a MixQuantError, or changes nothing that is read."""
    ready, config = tiny.compressed_tensors(bf16_tensors())
    folder = save(tmp_path / "ready", ready, config)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for bit in range(0, size * 8, 41):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            weights = ReadyMadeWeights.open(str(folder), "here")
            for name in LINEARS:
                linear = weights.linear(name, ())
                if linear is not None:
                    n, k = SHAPES[name.split(".", 3)[3]]
                    linear.place(Share((n,), k, k))
                    linear.load(torch.zeros(n, k, dtype=torch.bfloat16), check=False)
            weights.check_all_taken()
        except MixQuantError:
            refused += 1
    assert refused > 100
