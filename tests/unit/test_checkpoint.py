"""`mixquant quantize`: the result against compressed-tensors' own decompression, and what an interruption leaves."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.tools import cli
from mixquant_sglang.tools.quantize import checkpoint, command, writer
from mixquant_sglang.tools.quantize.checkpoint import quantize_checkpoint
from mixquant_sglang.tools.quantize.configs import quantization_config
from mixquant_sglang.tools.quantize.progress import COLUMNS, PROGRESS, locked
from mixquant_sglang.tools.quantize.scales import encode_scale
from mixquant_sglang.tools.quantize.targets import Targets
from mixquant_sglang.tools.quantize.writer import PARTIAL
from mixquant_sglang.weights.checkpoint import INDEX

HIDDEN, INNER, LAYERS = 64, 96, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (32, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LINEARS = [f"model.layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in SHAPES]
Tensors = dict[str, torch.Tensor]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's, which has an invalid escape in a docstring
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import generate_gparam


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(hidden: int = HIDDEN) -> Tensors:
    """A small dense model with the names that real ones have, and some that must never be quantised."""
    random = torch.Generator().manual_seed(4)

    def make(*shape: int) -> torch.Tensor:
        spread = torch.rand(1, generator=random).item() * 4 - 2
        return (torch.randn(shape, generator=random) * 10**spread).bfloat16()

    made = {"model.embed_tokens.weight": make(128, hidden), "lm_head.weight": make(128, hidden)}
    for layer in range(LAYERS):
        for leaf, (n, k) in SHAPES.items():
            made[f"model.layers.{layer}.{leaf}.weight"] = make(n, hidden if k == HIDDEN else k)
        made[f"model.layers.{layer}.self_attn.q_proj.bias"] = make(HIDDEN)
        made[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] = make(64, 32)
        made[f"model.layers.{layer}.mlp.gate.weight"] = make(8, hidden)
        made[f"model.layers.{layer}.input_layernorm.weight"] = make(hidden)
    made["model.layers.2.self_attn.q_proj.weight"] = make(32, 32)  # a draft layer: the config has two
    made["visual.layers.0.attn.q_proj.weight"] = make(32, 32)
    made["model.rotary.positions"] = torch.arange(5)
    return made


def write(folder: Path, made: Tensors, shards: int = 0) -> Path:
    """``shards`` > 0 deals the tensors out like cards, so that every fused group lies in more than one file."""
    folder.mkdir(parents=True)
    config = {"model_type": "qwen3", "num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"é": 1}')
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}")
    (folder / ".hidden").write_text("x")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    if not shards:
        save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(sorted(made))}
    for shard in names:
        mine = {name: made[name] for name, where in weight_map.items() if where == shard}
        save_file(mine, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read(folder: Path) -> Tensors:
    loaded: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded |= load_file(file)
    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def quantised(loaded: Tensors) -> list[str]:
    return [name.removesuffix(".weight_packed") for name in loaded if name.endswith(".weight_packed")]


def config_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def decompressed(loaded: Tensors, config: dict[str, Any], name: str) -> torch.Tensor:
    """compressed-tensors' own reading of one linear: BF16."""
    scheme = QuantizationConfig.model_validate(config["quantization_config"]).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["quantization_config"]["format"])
    state = {key: loaded[f"{name}.{key}"] for key in compressor.compression_param_names(scheme)}
    weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
    return weight


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("scales", nvfp4.SCALE_MODES)
def test_compressed_tensors_reads_our_values(tmp_path: Path, shards: int, scales: str) -> None:
    made = tensors()
    out = tmp_path / "out"
    quantize_checkpoint(write(tmp_path / "model", made, shards), out, scales=scales)
    loaded, config = read(out), config_of(out)
    assert sorted(quantised(loaded)) == sorted(LINEARS)
    for name in LINEARS:
        g = loaded[f"{name}.weight_global_scale"]
        expected = nvfp4.quantize(made[f"{name}.weight"], scales=scales, tensor_scale=1 / g[0])
        assert torch.equal(loaded[f"{name}.weight_packed"], expected.packed)
        assert torch.equal(loaded[f"{name}.weight_scale"].float(), expected.block_scales.float())
        weight = decompressed(loaded, config, name)
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected.dequantize(torch.bfloat16))
        error = (weight.float() - made[f"{name}.weight"].float()).square().mean().sqrt()
        assert error < 0.15 * made[f"{name}.weight"].float().square().mean().sqrt()
        assert loaded[f"{name}.input_global_scale"].tolist() == [1.0]
    others = {name for name in made if name.removesuffix(".weight") not in LINEARS or name.endswith(".bias")}
    assert all(torch.equal(loaded[name], made[name]) and loaded[name].dtype == made[name].dtype for name in others)
    assert len(loaded) == len(others) + 4 * len(LINEARS)


def test_config_is_the_preset_of_compressed_tensors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(write(tmp_path / "model", tensors()), out)
    config = config_of(out)
    assert config["model_type"] == "qwen3"
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    preset = preset_name_to_scheme("NVFP4", ["Linear"])
    scheme = parsed.config_groups["group_0"]
    for ours, theirs in ((scheme.weights, preset.weights), (scheme.input_activations, preset.input_activations)):
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic"):
            assert getattr(ours, key) == getattr(theirs, key)
    assert parsed.ignore is not None
    assert set(parsed.ignore) == {
        *("lm_head", "model.layers.2.self_attn.q_proj", "visual.layers.0.attn.q_proj", r"re:(.*\.)?visual\."),
        *(f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in ("mlp.gate", "self_attn.kv_b_proj")),
    }


@pytest.mark.parametrize("shards", [0, 4])
def test_fused_layers_share_their_scale(tmp_path: Path, shards: int) -> None:
    made = tensors()
    out = tmp_path / "out"
    quantize_checkpoint(write(tmp_path / "model", made, shards), out)
    loaded = read(out)
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        for layer in range(LAYERS):
            names = [n for n in LINEARS if f".{layer}." in n and n.endswith(group)]
            amax = max(made[f"{name}.weight"].float().abs().max() for name in names)
            assert len(names) == len(group)
            for name in names:
                assert torch.equal(loaded[f"{name}.weight_global_scale"], encode_scale(float(amax)))


def test_global_scale_is_compressed_tensors_own() -> None:
    """To the bit, or an ulp away where compressed-tensors would not read our values otherwise: all values are tried."""
    config = {"quantization_config": quantization_config(Targets({}, {}))}
    packed = torch.arange(0x10, 0x110, 0x22, dtype=torch.uint8).expand(127, 8)  # the elements 0, 1, ... 15
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    random = torch.Generator().manual_seed(0)
    moved = 0
    for amax in torch.rand(500, generator=random).mul(4).bfloat16().float():
        g, theirs = encode_scale(float(amax)), generate_gparam(-amax, amax).reshape(1)
        assert torch.equal(g, theirs) or torch.equal(g, torch.nextafter(theirs, torch.zeros(1)))
        moved += not torch.equal(g, theirs)
        state = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": g}
        read_by_them = decompressed({f"x.{key}": value for key, value in state.items()}, config, "x")
        ours = nvfp4.NVFP4Tensor(packed, scales, 1 / g[0]).dequantize()
        if Version(version("compressed-tensors")) >= Version("0.20"):
            assert torch.equal(read_by_them, ours)
        else:  # releases before round the scale on the way: a BF16 step apart for some g
            assert torch.allclose(read_by_them.float(), ours.float(), rtol=2**-7, atol=0)
    assert 0 < moved < 25
    assert encode_scale(0.0).tolist() == [1.0]
    for extreme in (1e-40, 3e-38, 3.3e38):
        assert 2.0**-126 <= encode_scale(extreme).item() <= 2.0**126


def test_zero_and_tiny_weights(tmp_path: Path) -> None:
    made = tensors()
    zero, tiny = LINEARS[3], LINEARS[6]
    made[f"{zero}.weight"].zero_()
    made[f"{tiny}.weight"].mul_(1e-30)
    out = tmp_path / "out"
    quantize_checkpoint(write(tmp_path / "model", made), out)
    loaded, config = read(out), config_of(out)
    assert not decompressed(loaded, config, zero).any()
    weight = decompressed(loaded, config, tiny)
    assert torch.allclose(
        weight.double(), made[f"{tiny}.weight"].double(), rtol=0.3, atol=weight.abs().max().item() / 8
    )


def test_ignore(tmp_path: Path) -> None:
    model = write(tmp_path / "model", tensors())
    out = tmp_path / "out"
    down, heads = "model.layers.0.mlp.down_proj", "re:.*layers.1.self_attn.[qkv]_proj$"
    quantize_checkpoint(model, out, ignore=[down, heads, "lm_head"])
    loaded = read(out)
    left = {down, *(f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkv")}
    assert set(quantised(loaded)) == set(LINEARS) - left
    assert left <= set(config_of(out)["quantization_config"]["ignore"])
    for pattern, message in (
        ("model.layers.0.mlp.down_pro", "matches no module.*did you mean 'model.layers.0.mlp.down_proj'"),
        ("re:(", "no regular expression"),
        ("re:.*0.self_attn.k_proj", "one fused layer"),
    ):
        with pytest.raises(MixQuantError, match=message):
            quantize_checkpoint(model, tmp_path / "other", ignore=[pattern])
    assert not (tmp_path / "other").exists()


def test_odd_k_stays(tmp_path: Path) -> None:
    made = tensors(hidden=40)
    out = tmp_path / "out"
    targets = quantize_checkpoint(write(tmp_path / "model", made), out)
    loaded = read(out)
    odd = [name for name in LINEARS if made[f"{name}.weight"].shape[1] == 40]
    assert len(odd) == 6 * LAYERS
    assert sorted(quantised(loaded)) == sorted(set(LINEARS) - set(odd))
    assert all(torch.equal(loaded[f"{name}.weight"], made[f"{name}.weight"]) for name in odd)
    assert all(targets.kept[name] == "K = 40 is not a multiple of 16" for name in odd)
    assert set(odd) <= set(config_of(out)["quantization_config"]["ignore"])


def test_small_files_go_along(tmp_path: Path) -> None:
    model = write(tmp_path / "model", tensors(), shards=2)
    out = tmp_path / "out"
    quantize_checkpoint(model, out)
    assert set(contents(out)) == {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX),
        *("config.json", "tokenizer.json", "templates/chat.jinja"),
    }
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    index = json.loads((out / INDEX).read_text())
    assert set(index["weight_map"]) == set(read(out))
    assert all(name in load_file(out / shard) for name, shard in index["weight_map"].items())


class Killed(BaseException):
    """What no handler of the package may catch."""


def kill_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool) -> None:
    """Ends the run before or after the given call (from 1) of a function."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def dying(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        result = original(*args)
        if calls == call:
            raise Killed
        return result

    patch.setattr(owner, name, dying)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_rename(tmp_path: Path, after: bool) -> None:
    """Every file gets its name by one rename: dies at each of them in turn, looks at what is left, goes on."""
    model = write(tmp_path / "model", tensors(), shards=3)
    whole = tmp_path / "whole"
    quantize_checkpoint(model, whole)
    expected = contents(whole)
    for call in range(1, 100):
        out = tmp_path / f"out{call}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, Path, "replace", call, after=after)
            try:
                quantize_checkpoint(model, out)
            except Killed:
                died = True
            else:
                died = False
        if died:
            left = contents(out)
            named = {name for name in left if not name.endswith(PARTIAL)} - {PROGRESS}
            assert all(left[name] == expected[name] for name in named)
            assert "config.json" not in named or set(expected) <= named
            assert INDEX not in named or {f for f in expected if f.endswith(".safetensors")} <= named
            quantize_checkpoint(model, out)
        assert contents(out) == expected
        if not died:
            break
    # note, 3 x (shard, note), tokenizer, template, index, config
    assert call == 1 + 6 + 4 + 1


def test_resume_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = write(tmp_path / "model", tensors(), shards=3), tmp_path / "out"
    names = sorted(path.name for path in model.glob("*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        # two calls for each file, itself and its folder: the note, the first shard, the note, and now the second shard
        kill_at(patch, os, "fsync", 7, after=False)
        with pytest.raises(Killed):
            quantize_checkpoint(model, out)
    left = {PROGRESS, names[0], names[1] + PARTIAL}
    assert {path.name for path in out.iterdir()} == left
    written: list[str] = []
    original = writer.write_shard
    monkeypatch.setattr(writer, "write_shard", lambda path, *rest: (written.append(path.name), original(path, *rest)))
    before = (out / names[0]).stat().st_mtime_ns
    quantize_checkpoint(model, out)
    assert names[0] not in written and written == names[1:]
    assert (out / names[0]).stat().st_mtime_ns == before
    quantize_checkpoint(model, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def unfinished(model: Path, out: Path, **settings: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, Path, "replace", 3, after=True)
        with pytest.raises(Killed):
            quantize_checkpoint(model, out, **settings)


def test_foreign_resume_is_refused(tmp_path: Path) -> None:
    model, out = write(tmp_path / "model", tensors(), shards=3), tmp_path / "out"
    unfinished(model, out)
    left = contents(out)
    with pytest.raises(MixQuantError, match=r"another settings \(scales: 'absmax' then, 'search' now\).*remove OUT"):
        quantize_checkpoint(model, out, scales="search")
    with pytest.raises(MixQuantError, match=r"another settings \(ignore: .*remove OUT"):
        quantize_checkpoint(model, out, ignore=["lm_head"])
    shard = sorted(model.glob("*.safetensors"))[1]
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(MixQuantError, match=r"another source \(model-00002-of-00003.safetensors changed\).*remove OUT"):
        quantize_checkpoint(model, out)
    assert contents(out) == left
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    quantize_checkpoint(model, out)
    with pytest.raises(MixQuantError, match=r"not empty.*no unfinished run; remove it"):
        quantize_checkpoint(model, out)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    model = write(tmp_path / "model", tensors())
    with (
        locked(tmp_path / "out"),
        pytest.raises(MixQuantError, match="another run is writing there"),
    ):
        quantize_checkpoint(model, tmp_path / "out")


@pytest.mark.parametrize("name", [f"{LINEARS[1]}.weight", "lm_head.weight", f"{LINEARS[0]}.bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_is_named(tmp_path: Path, name: str, value: float) -> None:
    made = tensors()
    made[name].view(-1)[7] = value
    model, out = write(tmp_path / "model", made), tmp_path / "out"
    with pytest.raises(MixQuantError, match=f"{name} contains NaN or infinity"):
        quantize_checkpoint(model, out)
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(MixQuantError, match=message):
            quantize_checkpoint(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    model = write(tmp_path / "a", tensors())
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    refused(model, "quantised already")
    quantize_checkpoint(write(tmp_path / "b", tensors()), tmp_path / "done")
    stripped = config_of(tmp_path / "done")
    del stripped["quantization_config"]
    (tmp_path / "done" / "config.json").write_text(json.dumps(stripped))
    refused(tmp_path / "done", "quantised already")
    integers = tensors()
    integers[f"{LINEARS[2]}.weight"] = torch.ones((32, HIDDEN), dtype=torch.int8)
    refused(write(tmp_path / "c", integers), f"{LINEARS[2]}.weight is I8; allowed: BF16, F16, F32")
    refused(write(tmp_path / "d", {"lm_head.weight": torch.ones(16, 16)}), "no linear to quantise")
    refused(tmp_path / "nowhere", "no such folder")
    cut = write(tmp_path / "e", tensors())
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused(cut, "is not a complete safetensors file")
    file.write_bytes(b"\x10")
    refused(cut, "not a complete safetensors file")
    file.unlink()
    refused(cut, r"model.safetensors: no such file; MODEL needs")
    missing = write(tmp_path / "f", tensors(), shards=2)
    index = json.loads((missing / INDEX).read_text())
    index["weight_map"]["extra.weight"] = "model-00001-of-00002.safetensors"
    (missing / INDEX).write_text(json.dumps(index))
    refused(missing, "extra.weight is listed in model-00001-of-00002.safetensors, but is not there")


def put_header(file: Path, header: Any, data: bytes | None = None) -> None:
    old = file.read_bytes()
    length = int.from_bytes(old[:8], "little")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + (old[8 + length :] if data is None else data))


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


ONE = f"{LINEARS[0]}.weight"
HEADERS: dict[str, dict[str, Any]] = {
    "negative shape": {"shape": [-32, -32]},
    "decimal shape": {"shape": [32.0, 32.0]},
    "text shape": {"shape": "32"},
    "null shape": {"shape": None},
    "null dtype": {"dtype": None},
    "unknown dtype": {"dtype": "BF17"},
    "huge shape": {"shape": [2**63, 2**63]},
    "overlapping offsets": {"data_offsets": [0, 2048]},
    "backward offsets": {"data_offsets": [2048, 0]},
    "offsets beyond the end": {"data_offsets": [2**40, 2**40 + 2048]},
    "one offset": {"data_offsets": [0]},
    "misshapen": {"shape": [1, 1]},
}


def one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and what was said; whatever is not a MixQuantError comes out of here."""
    status = cli.main(command)
    said = capsys.readouterr().err.strip()
    assert status == 0 or (said.startswith("mixquant: ") and "\n" not in said), said
    return status, said


@pytest.mark.parametrize("name", HEADERS)
def test_broken_headers_get_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "model", tensors())
    file = model / "model.safetensors"
    header = header_of(file)
    assert ONE in header
    header[ONE] |= HEADERS[name]
    put_header(file, header)
    status, said = one_line(["quantize", str(model), str(tmp_path / "out")], capsys)
    assert status == 1 and f"{file}: is not a complete safetensors file; download it again" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [b"[]", b"{", b"\xff\xfe{}", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"a\\ud800": {}}', b"", b"null"],
)
def test_headers_that_are_none_get_one_line(tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "model", tensors())
    put_header(model / "model.safetensors", text)
    status, said = one_line(["quantize", str(model), str(tmp_path / "out")], capsys)
    assert status == 1 and "is not a complete safetensors file" in said


CONFIGS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "no layers": ({"num_hidden_layers": None}, "num_hidden_layers is 'null'; allowed: an integer of at least 1"),
    "half a layer": ({"num_hidden_layers": 1.5}, "num_hidden_layers is '1.5'"),
    "a boolean": ({"num_hidden_layers": True}, "num_hidden_layers is 'true'"),
    "text_config a list": ({"text_config": []}, "text_config has to be a JSON object"),
    "quantised inside": ({"text_config": {"quantization_config": {"a": 1}}}, "is quantised already"),
    "compressed": ({"compression_config": {"a": 1}}, "is quantised already"),
    "not UTF-8": (b'{"a": "\xff"}', "config.json: is not JSON"),
    "half a pair": (b'{"a": "\\ud800"}', "config.json: is not JSON"),
    "deep": (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "nested too deeply; allowed: 64"),
    "deeper": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a long number": (b'{"a": ' + b"1" * 5000 + b"}", "config.json: is not JSON"),
    "a list": (b"[]", "config.json: has to be a JSON object"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_broken_configs_get_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, (made, message) = write(tmp_path / "model", tensors()), CONFIGS[name]
    text = made if isinstance(made, bytes) else json.dumps(config_of(model) | made).encode()
    (model / "config.json").write_bytes(text)
    status, said = one_line(["quantize", str(model), str(tmp_path / "out")], capsys)
    assert status == 1 and message in said


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_config_that_says_not_quantised_is_not_quantised(tmp_path: Path, nothing: Any) -> None:
    model = write(tmp_path / "model", tensors())
    plain = quantize_checkpoint(model, tmp_path / "plain")
    said = config_of(model) | {"quantization_config": nothing, "text_config": None, "compression_config": nothing}
    (model / "config.json").write_text(json.dumps(said))
    assert quantize_checkpoint(model, tmp_path / "out") == plain
    assert config_of(tmp_path / "out")["quantization_config"] == config_of(tmp_path / "plain")["quantization_config"]


def test_tensors_that_an_index_hides_are_taken_along(tmp_path: Path) -> None:
    model = write(tmp_path / "model", tensors(), shards=2)
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][ONE]
    (model / INDEX).write_text(json.dumps(index))
    quantize_checkpoint(model, tmp_path / "out")
    assert LINEARS[0] in quantised(read(tmp_path / "out"))
    listed = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert f"{LINEARS[0]}.weight_packed" in listed


def test_shards_that_an_index_hides_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "model", tensors(), shards=2)
    text = (model / INDEX).read_text()
    index = json.loads(text)
    kept = {name: shard for name, shard in index["weight_map"].items() if shard.startswith("model-00001")}
    (model / INDEX).write_text(json.dumps({"weight_map": kept}))
    status, said = one_line(["quantize", str(model), str(tmp_path / "out")], capsys)
    assert status == 1 and "model-00002-of-00002.safetensors: is not in model.safetensors.index.json" in said
    (model / INDEX).write_text(text)
    save_file(tensors(), model / "consolidated.safetensors")  # the same weights as another library reads them
    assert cli.main(["quantize", str(model), str(tmp_path / "out")]) == 0
    assert "left out (not in model.safetensors.index.json): consolidated.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize("shard", ["", ".", "..", "a/b.safetensors", "a\0.safetensors", 7, None, "config.json"])
def test_an_index_names_files_of_the_folder(tmp_path: Path, shard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "model", tensors(), shards=2)
    (model / INDEX).write_text(json.dumps({"weight_map": {ONE: shard}}))
    status, said = one_line(["quantize", str(model), str(tmp_path / "out")], capsys)
    assert status == 1 and "'weight_map' has to map tensor names to safetensors files of this folder" in said


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "model", tensors(), shards=2)
    for shard in sorted(model.glob("*.safetensors")):
        save_file(load_file(shard) | {"twice": torch.ones(2)}, shard)
    status, said = one_line(["quantize", str(model), str(tmp_path / "out")], capsys)
    assert status == 1 and "twice is in model-00001-of-00002.safetensors too" in said


def test_names_that_the_result_needs_are_refused(tmp_path: Path) -> None:
    made = tensors() | {f"{LINEARS[0]}.input_global_scale": torch.ones(1)}
    with pytest.raises(MixQuantError, match=r"is quantised already \(.*input_global_scale\)"):
        quantize_checkpoint(write(tmp_path / "model", made), tmp_path / "out")


JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        2**70,
        "",
        "BF16",
        "F32",
        "model.safetensors",
        "\ud800",
        [],
        {},
        [0, 0],
        [[1]],
        "x" * 300,
    ),
    *([32, 32], [16, 64], [-1, 5], {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}),
)


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy of JSON with one thing in it changed, taken out, or put in."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice([*value])
        what = draw.randrange(8)
        if what == 0:
            return {name: item for name, item in value.items() if name != key}
        if what == 1:
            return value | {draw.choice([*value, "new", "text_config", "quantization_config"]): draw.choice(JUNK)}
        if what == 2:
            return {(draw.choice([*value, "other"]) if name == key else name): item for name, item in value.items()}
        return value | {key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        i = draw.randrange(len(value))
        return [*value[:i], mutated(value[i], draw), *value[i + 1 :]]
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 2, -2048, 2048))
    return draw.choice(JUNK)


def damage(model: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".json")))
    data = file.read_bytes()
    how = draw.randrange(5)
    if how == 0:
        file.write_bytes(data[: draw.randrange(len(data))])
    elif how == 1:
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(min(len(data), 3000))
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        file.write_bytes(data)
    elif file.suffix == ".json":
        file.write_text(json.dumps(mutated(json.loads(data), draw)))
    else:
        put_header(file, mutated(header_of(file), draw))


@pytest.mark.slow
def test_damaged_checkpoints_get_one_line_or_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = int(os.environ.get("CHECKPOINT_MUTATIONS", "100"))
    draw, endings = random.Random(17), {0: 0, 1: 0}
    few = {name: tensor for name, tensor in tensors().items() if ".1." not in name}
    whole = [write(tmp_path / f"whole{shards}", few, shards) for shards in (0, 2)]
    for _ in range(rounds):
        model, out = tmp_path / "model", tmp_path / "out"
        for folder in (model, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(draw.choice(whole), model)
        damage(model, draw)
        status, _ = one_line(["quantize", str(model), str(out)], capsys)
        endings[status] += 1
        if status == 0:
            before = {name for file in model.glob("*.safetensors") for name in header_of(file)} - {"__metadata__"}
            after = {name for file in out.glob("*.safetensors") for name in header_of(file)} - {"__metadata__"}
            assert {name for name in before if name not in after and f"{name}_packed" not in after} == set()
        else:
            assert not (out / "config.json").exists()
    assert min(endings.values()) > rounds // 20  # both kinds of endings were seen


@pytest.mark.parametrize("inside", [".", "out", "a/b"])
def test_out_inside_of_model_is_refused(tmp_path: Path, inside: str) -> None:
    model = write(tmp_path / "model", tensors())
    before = contents(model)
    with pytest.raises(MixQuantError, match="lies in MODEL"):
        quantize_checkpoint(model, model / inside)
    assert contents(model) == before


def test_memory_is_a_layer_not_a_model(tmp_path: Path) -> None:
    """Tensors of the source live in Python's memory, which tracemalloc counts; results are counted one by one. Not
    counted: nvfp4.quantize's temporaries, which its own chunks of rows bound. The source has 60 such weights."""
    made = {
        f"model.layers.{layer}.mlp.down_proj.weight": torch.ones((512, 256), dtype=torch.bfloat16)
        for layer in range(60)
    }
    model = write(tmp_path / "model", made, shards=2)
    (model / "config.json").write_text('{"num_hidden_layers": 60}')
    one = 512 * 256 * 2
    live = peak = 0
    original = nvfp4.quantize

    def counted(x: torch.Tensor, **kwargs: Any) -> nvfp4.NVFP4Tensor:
        nonlocal live, peak
        result = original(x, **kwargs)
        live += 1
        peak = max(peak, live)

        def gone() -> None:
            nonlocal live
            live -= 1

        weakref.finalize(result, gone)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvfp4, "quantize", counted)
        tracemalloc.start()
        quantize_checkpoint(model, tmp_path / "out")
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak == 1
    assert held < 2 * one  # and the headers


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    model, out = write(tmp_path / "model", tensors()), tmp_path / "out"
    assert command.run(parser.parse_args([str(model), str(out), "--scales", "search"])) == 0
    printed = capsys.readouterr().out
    assert "kept as it is (never quantised): " in printed
    assert printed.endswith("14 linears in NVFP4, search scales\n")


@pytest.fixture(scope="module")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of one layer, whose tokenizer knows 16 words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(16)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        folder = tmp_path_factory.mktemp("micro") / "model"
        PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template).save_pretrained(folder)
        torch.manual_seed(0)
        shape = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, tie_word_embeddings=True)).to(torch.bfloat16)
        model.save_pretrained(folder)
    return folder


def test_calibration(tmp_path: Path, micro_model: Path) -> None:
    lines = [
        {"text": "w1 w2"},
        {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w3"}]},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    quantize_checkpoint(micro_model, tmp_path / "out", calibration=file)
    loaded, source = read(tmp_path / "out"), read(micro_model)
    # what the first layer's q, k and v read: RMSNorm of the embeddings (its weight is 1)
    x = source["model.embed_tokens.weight"][[1, 2, 7, 3]].float()
    amax = (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).abs().max().bfloat16().float()
    for leaf in ("q_proj", "k_proj", "v_proj"):
        assert loaded[f"model.layers.0.self_attn.{leaf}.input_global_scale"].item() == pytest.approx(
            2688 / amax.item(), rel=0.01
        )
    gate, up = (loaded[f"model.layers.0.mlp.{leaf}_proj.input_global_scale"] for leaf in ("gate", "up"))
    assert torch.equal(gate, up) and gate != 1
    unfinished_out = tmp_path / "unfinished"
    unfinished(micro_model, unfinished_out, calibration=file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "measure_inputs", None)  # it is not run again
        quantize_checkpoint(micro_model, unfinished_out, calibration=file)
    assert contents(unfinished_out) == contents(tmp_path / "out")


def test_weighted_scales(tmp_path: Path, micro_model: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "w1 w2"}\n{"text": "w3 w4 w5"}')
    made = read(micro_model)
    embedding = made["model.embed_tokens.weight"]
    embedding[:, 5] *= 40  # an outlier channel
    embedding[:, 16:32] = 0  # a block of columns without any input
    model = tmp_path / "model"
    shutil.copytree(micro_model, model)
    save_file(made, model / "model.safetensors", metadata={"format": "pt"})
    for scales in ("absmax", "search", "weighted"):
        quantize_checkpoint(model, tmp_path / scales, scales=scales, calibration=file)
    loaded, config = read(tmp_path / "weighted"), config_of(tmp_path / "weighted")
    assert set(contents(tmp_path / "weighted")) == set(contents(tmp_path / "search"))

    x = embedding[[1, 2, 3, 4, 5]].float()
    energy = (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16().float().square().mean(0)
    assert (energy[16:32] == 0).all() and energy[5] > 10 * energy[4]
    for name in (f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"):
        weight = made[f"{name}.weight"].float()
        error = {}
        for scales in ("absmax", "search", "weighted"):
            values = decompressed(read(tmp_path / scales), config, name).float()
            error[scales] = ((values - weight).square() * energy).view(-1, 16).sum(-1)
        assert (error["weighted"] <= error["absmax"] * (1 + 1e-5)).all()
        assert error["weighted"].sum() < 0.7 * error["search"].sum()
        other = load_file(tmp_path / "search" / "model.safetensors")
        assert torch.equal(loaded[f"{name}.weight_global_scale"], other[f"{name}.weight_global_scale"])
        dead = slice(8, 16), slice(1, 2)  # bytes of codes, scale
        assert torch.equal(loaded[f"{name}.weight_packed"][:, dead[0]], other[f"{name}.weight_packed"][:, dead[0]])
        assert torch.equal(loaded[f"{name}.weight_scale"][:, 1].float(), other[f"{name}.weight_scale"][:, 1].float())

    for after, again in ((False, True), (True, False)):  # dies before or after the note that holds the measurement
        out = tmp_path / f"unfinished{after}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, Path, "replace", 3, after=after)  # note, columns, note
            with pytest.raises(Killed):
                quantize_checkpoint(model, out, scales="weighted", calibration=file)
        assert (out / COLUMNS).exists()
        with pytest.MonkeyPatch.context() as patch:
            if not again:
                patch.setattr(checkpoint, "measure_inputs", None)
            quantize_checkpoint(model, out, scales="weighted", calibration=file)
        assert contents(out) == contents(tmp_path / "weighted")


def test_weighted_scales_need_calibration(tmp_path: Path) -> None:
    with pytest.raises(MixQuantError, match=r"--scales weighted.*needs --calibration FILE\.jsonl"):
        quantize_checkpoint(write(tmp_path / "m", tensors()), tmp_path / "out", scales="weighted")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', '{"text": ""}', "[1]", ""])
def test_calibration_lines_are_checked(tmp_path: Path, line: str) -> None:
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(MixQuantError, match=r"data\.jsonl:1: |has no samples"):
        quantize_checkpoint(write(tmp_path / "m", tensors()), tmp_path / "out", calibration=tmp_path / "data.jsonl")
    assert not (tmp_path / "out").exists()


def test_transformers_loads_it(tmp_path: Path, micro_model: Path) -> None:
    quantize_checkpoint(micro_model, tmp_path / "out")
    loaded, config = read(tmp_path / "out"), config_of(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        with torch.no_grad():
            assert not model(torch.arange(8)[None]).logits.isnan().any()
    for name in quantised(loaded):
        assert torch.equal(model.get_submodule(name).weight, decompressed(loaded, config, name))


def test_an_output_that_cannot_be_made_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixquant_sglang.tools.quantize import checkpoint

    model = write(tmp_path / "model", tensors())
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "inside"
    status, said = one_line(["quantize", str(model), str(out)], capsys)
    assert status == 1 and f"OUT {out}: cannot be made a folder (Not a directory); name another" in said
    missing = ["--scales", "weighted", "--calibration", str(tmp_path / "none.jsonl")]
    status, said = one_line(["quantize", str(model), str(tmp_path / "out"), *missing], capsys)
    assert status == 1 and "none.jsonl" in said and said.endswith("nothing was written yet")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.writer, "write_shard", full)
    assert cli.main(["quantize", str(model), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert (tmp_path / "out" / checkpoint.PROGRESS).exists()
    assert said.rstrip().endswith("No space left on device; the same command goes on where it stopped")
