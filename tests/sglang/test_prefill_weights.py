"""Ready-made prefill weights in SGLang's own linears: slices, the load report, refusals and weight updates."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang import recipe
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.formats.nvfp4 import NVFP4Tensor
from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks import registry
from mixquant_sglang.passes.running import DECODE_PASS, Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device
from mixquant_sglang.versions import batches, fp4, machine
from tests.support import nvfp4_checkpoints as tiny
from tests.support.nvfp4_checkpoints import CONFIG, HIDDEN, INNER, LINEARS, MODELOPT, Tensors, bf16_tensors, save

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "check_hooks_took_effect", lambda *_: None)
    monkeypatch.setattr(machine, "device", lambda: Device("this CPU", None))
    monkeypatch.setattr(runtime, "_runtime", None)
    yield


class Model:
    """The linears of a small Qwen3 as SGLang builds and loads them on one of ``ranks`` ranks."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        folder: Path,
        made: Tensors,
        rank: int = 0,
        ranks: int = 1,
        text: str = "precision: nvfp4",
        rules: str = "",
    ) -> None:
        from mixquant_sglang.host.config import MixQuantConfig

        file = folder.parent / "mine.yaml"
        file.write_text(f"version: 1\nprefill: {{{text}, weights: {folder}}}\n{rules}")
        monkeypatch.setenv(recipe.RECIPE_ENV, str(file))
        self.config = MixQuantConfig()
        self.made = made
        self.root = torch.nn.Module()
        self.linears: dict[str, Any] = {}
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            for layer in range(tiny.LAYERS):
                for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
                    name = f"model.layers.{layer}.{leaf}"
                    self.linears[name] = self._linear(monkeypatch, name, rank, ranks)
                    self._add(name, self.linears[name])
                norm = f"model.layers.{layer}.input_layernorm"
                self._add(norm, torch.nn.Module())
                self.root.get_submodule(norm).weight = torch.nn.Parameter(made[f"{norm}.weight"])
        finally:
            torch.set_default_dtype(before)

    def _add(self, name: str, module: torch.nn.Module) -> None:
        parent = self.root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, module)

    def _linear(self, monkeypatch: pytest.MonkeyPatch, name: str, rank: int, ranks: int) -> Any:
        from sglang.srt.layers import linear

        more: dict[str, Any] = {"bias": False, "quant_config": self.config, "prefix": name}
        if hasattr(linear, "_resolve_linear_group"):  # 0.5.23
            monkeypatch.setattr(linear, "_resolve_linear_group", lambda _: linear._LogicalGroup(rank, ranks))
        else:
            more |= {"tp_rank": rank, "tp_size": ranks}
        leaf = name.rpartition(".")[2]
        if leaf == "qkv_proj":
            return linear.QKVParallelLinear(HIDDEN, 16, 4, 2, **more)
        if leaf == "gate_up_proj":
            return linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **more)
        return linear.RowParallelLinear(HIDDEN if leaf == "o_proj" else INNER, HIDDEN, **more)

    def load(self) -> Model:
        """Through SGLang's own weight loaders."""
        for name, layer in self.linears.items():
            self.load_one(name)
            layer.quant_method.process_weights_after_loading(layer)
        return self

    def load_one(self, name: str) -> None:
        weight = self.linears[name].weight
        parent, _, leaf = name.rpartition(".")
        if leaf not in FUSED:
            return weight.weight_loader(weight, self.made[f"{name}.weight"])  # type: ignore[no-any-return]
        ids = ("q", "k", "v") if leaf == "qkv_proj" else (0, 1)
        for shard, shard_id in zip(FUSED[leaf], ids, strict=True):
            weight.weight_loader(weight, self.made[f"{parent}.{shard}.weight"], shard_id)

    def finish(self) -> None:
        runner = SimpleNamespace(model=self.root, device="cpu", is_generation=True, server_args=SimpleNamespace())
        runner.spec_algorithm = SimpleNamespace(name="NONE")
        self.config._runtime.lifecycle.finish_load(runner)

    def apply(self, name: str, x: torch.Tensor, running: Pass) -> torch.Tensor:
        layer = self.linears[name]
        with scope(running):
            out: torch.Tensor = layer.quant_method.apply(layer, x)
        return out


def own_values(ready: Tensors, made: Tensors) -> Tensors:
    """The checkpoint's values, and BF16 where it has none: what a reference model would hold in FP32."""
    values = dict(made)
    for name in LINEARS:
        if f"{name}.weight_packed" in ready:
            packed, scales, g = (ready[f"{name}.weight_{key}"] for key in ("packed", "scale", "global_scale"))
            values[f"{name}.weight"] = NVFP4Tensor(packed, scales, 1 / g[0]).dequantize(torch.float32)
    return values


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (4, 1), (4, 2)])
def test_every_linear_prefills_with_its_slice_and_decodes_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int
) -> None:
    made = bf16_tensors()
    ready, config = tiny.compressed_tensors(made)
    folder = save(tmp_path / "ready", ready, config, shards=3)
    model = Model(monkeypatch, folder, made, rank, ranks).load()  # which compares with the master of this rank
    model.finish()
    torch.manual_seed(0)
    for name, layer in model.linears.items():
        x = torch.randn(5, layer.weight.shape[1], dtype=torch.bfloat16)
        assert torch.equal(model.apply(name, x, DECODE_PASS), F.linear(x, layer.weight))
        low = model.apply(name, x, Pass(Role.PROMPT))
        if x.shape[1] % 16:  # down_proj on one of four ranks
            assert ranks == 4 and torch.equal(low, F.linear(x, layer.weight))
            continue
        # SGLang's loader puts the reference values where it put the master
        values = layer.weight.clone().float()
        bf16, model.made = layer.weight.data, own_values(ready, made)
        layer.weight.data = values
        model.load_one(name)
        expected = nvfp4.quantize_activations(x).dequantize(torch.float64) @ layer.weight.double().T
        layer.weight.data = bf16
        assert torch.allclose(low.double(), expected, rtol=2**-8, atol=1e-5)
    run = runtime.current()
    assert run is not None
    assert run.extra_weight_bytes == sum(layer.quant_method.extra_bytes for layer in model.linears.values()) > 0


def test_the_load_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made = bf16_tensors()
    left = [name for name in LINEARS if name != "model.layers.0.mlp.down_proj"]
    folder = save(tmp_path / "ready", tiny.modelopt(made, [*left, "lm_head"]), MODELOPT)
    rules = "layers: [{match: model.layers.1.self_attn.qkv_proj, prefill: bf16}]\n"
    with caplog.at_level(logging.INFO):
        model = Model(monkeypatch, folder, made, rules=rules).load()
        model.finish()
    lines = [record.getMessage() for record in caplog.records]
    assert "mixquant: stays BF16 (not in the ready-made weights): model.layers.0.mlp.down_proj" in lines
    assert "mixquant: stays BF16 (by rule of the recipe): model.layers.1.self_attn.qkv_proj" in lines
    assert f"mixquant: NVFP4 weights come from {folder} (ModelOpt)" in lines
    kept = ", ".join(f"model.layers.1.self_attn.{part}" for part in ("k_proj", "q_proj", "v_proj"))
    assert f"mixquant: not taken from there (by rule of the recipe): {kept}" in lines
    assert "mixquant: not taken from there (never quantised): lm_head" in lines
    x = torch.randn(3, INNER, dtype=torch.bfloat16)
    layer = model.linears["model.layers.0.mlp.down_proj"]
    assert torch.equal(model.apply("model.layers.0.mlp.down_proj", x, Pass(Role.PROMPT)), F.linear(x, layer.weight))


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_any_rounding_is_taken_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ranks: int, rank: int
) -> None:
    made = bf16_tensors()
    ready, config = tiny.fed_back(made)
    folder = save(tmp_path / "ready", ready, config)
    with pytest.raises(SystemExit, match="rounding: any"):
        Model(monkeypatch, folder, made, rank, ranks).load()
    monkeypatch.setattr(runtime, "_runtime", None)
    with caplog.at_level(logging.INFO):
        model = Model(monkeypatch, folder, made, rank, ranks, "precision: nvfp4, rounding: any").load()
        model.finish()
    assert "any rounding: of the codes that this process holds" in caplog.text
    name, x = "model.layers.1.self_attn.o_proj", torch.randn(5, HIDDEN // ranks, dtype=torch.bfloat16)
    assert torch.equal(model.apply(name, x, DECODE_PASS), F.linear(x, model.linears[name].weight))
    columns = slice(rank * HIDDEN // ranks, (rank + 1) * HIDDEN // ranks)
    values = own_values(ready, made)[f"{name}.weight"][:, columns].double()
    expected = nvfp4.quantize_activations(x).dequantize(torch.float64) @ values.T
    assert torch.allclose(model.apply(name, x, Pass(Role.PROMPT)).double(), expected, rtol=2**-8, atol=1e-5)


def test_an_optional_rule_that_matches_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = bf16_tensors()
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(made))
    rules = (
        "layers:\n- {match: 're:.*\\.o_proj', prefill: fp8, optional: true}\n- {match: 're:.*\\.out_proj', prefill: fp8"
    )
    with caplog.at_level(logging.INFO):
        Model(monkeypatch, folder, made, rules=rules + ", optional: true}\n").load().finish()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("/")[2] for line in lines if "matches no layer" in line] == [
        r"mine.yaml:5: optional rule 're:.*\.out_proj' matches no layer"
    ]
    assert any("linears by prefill precision: 2 fp8, 6 nvfp4; " in line for line in lines)
    with pytest.raises(SystemExit, match=r"mine\.yaml:5 layers\.match: 're:.*out_proj' matches no layer"):
        Model(monkeypatch, folder, made, rules=rules + "}\n").load().finish()


def test_an_update_replaces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the BF16 weight changed: decode and prefill never see different weights.  The others are read again."""
    made, name, same = bf16_tensors(), "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(made, scales="absmax"))
    model = Model(monkeypatch, folder, made).load()
    model.finish()
    run, x = runtime.current(), torch.randn(3, HIDDEN, dtype=torch.bfloat16)
    y = torch.randn(3, INNER, dtype=torch.bfloat16)
    assert run is not None
    before = model.apply(name, x, Pass(Role.PROMPT)), model.apply(same, y, Pass(Role.PROMPT))
    masters = {linear: layer.weight.data.clone() for linear, layer in model.linears.items()}

    def lose_copies() -> None:  # as after release_memory_occupation
        for layer in model.linears.values():
            for tensor in layer.quant_method._packed["nvfp4"].tensors():
                tensor.fill_(0)

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model.linears[name].weight.data.mul_(-3)
            lose_copies()
            run.weights.changed()
            assert run.weights.refresh() is None
            packed = model.linears[name].quant_method._packed["nvfp4"]
            parts = torch.split(model.linears[name].weight.data, [HIDDEN, 32, 32])
            expected = torch.cat([nvfp4.quantize(part, scales="search").dequantize(torch.float32) for part in parts])
            held = torch.cat([part.dequantize(torch.float32) for part in packed._parts])
            assert torch.equal(held, expected)
            assert torch.equal(model.apply(same, y, Pass(Role.PROMPT)), before[1])
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "mixquant: the BF16 weights were updated, so layers that changed no longer prefill with the ready-made "
        f"weights of {folder}, but are quantised from the new BF16 weights"
    ]
    for linear, layer in model.linears.items():
        layer.weight.data.copy_(masters[linear])
    lose_copies()
    run.weights.changed()
    assert run.weights.refresh() is None
    assert torch.equal(model.apply(name, x, Pass(Role.PROMPT)), before[0])


def test_what_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bf16_tensors()
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(made))
    weight, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    with pytest.raises(SystemExit, match=r"mlp\.up_proj\.weight_packed is not this weight of the BF16 checkpoint"):
        Model(monkeypatch, folder, {**made, weight: made[weight].flip(0)}).load()
    with pytest.raises(SystemExit, match=f"{norm} is not that of the BF16 checkpoint"):
        Model(monkeypatch, folder, {**made, norm: made[norm] * 2}).load().finish()
    ready, config = tiny.compressed_tensors(made)
    short = save(tmp_path / "short", {n: t for n, t in ready.items() if n != f"{weight}_scale"}, config)
    with pytest.raises(SystemExit, match=r"mine\.yaml:2 prefill\.weights: .*short: .*up_proj\.weight_scale is missing"):
        Model(monkeypatch, short, made)
    of_o_proj = {n: t.clone() for n, t in ready.items() if n.startswith(LINEARS[3])}
    extra = {f"model.layers.0.extra.{n.rpartition('.')[2]}": t for n, t in of_o_proj.items()}
    extended = save(tmp_path / "extended", {**ready, **extra}, config)
    with pytest.raises(SystemExit, match=r"model\.layers\.0\.extra\.weight_packed belongs to no layer of this model"):
        Model(monkeypatch, extended, made).load().finish()


def test_they_need_nvfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(bf16_tensors()))
    monkeypatch.setattr(machine, "device", lambda: Device("NVIDIA H200", (9, 0)))
    with pytest.raises(SystemExit, match=r"mine\.yaml:2 prefill\.weights: holds NVFP4 weights, but prefill is fp8 \("):
        Model(monkeypatch, folder, bf16_tensors(), text="precision: auto")


def test_another_model_is_refused_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.errors import MixQuantError
    from mixquant_sglang.host.hooks import launcher

    folder = save(tmp_path / "ready", *tiny.compressed_tensors(bf16_tensors()))
    file = tmp_path / "mine.yaml"
    file.write_text(f"version: 1\nprefill: {{precision: nvfp4, weights: {folder}}}")
    monkeypatch.setattr(launcher.asked, "recipe", recipe.load(str(file)))
    monkeypatch.setattr(launcher.asked, "command_line", False)
    for size in (HIDDEN, 128):
        config = SimpleNamespace(**{**CONFIG, "hidden_size": size}, dtype=torch.bfloat16)
        asked = SimpleNamespace(
            quantization="mixquant", hf_config=config, hf_text_config=config, dtype=torch.bfloat16, model_path="m"
        )
        if size == HIDDEN:
            launcher.check_checkpoint(asked)
            continue
        with pytest.raises(MixQuantError, match="hidden_size is 64, but 128 in the BF16 checkpoint"):
            launcher.check_checkpoint(asked)


def test_native_is_verified_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mixquant_sglang.kernels import registry
    from mixquant_sglang.kernels.environment import Environment
    from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
    from mixquant_sglang.kernels.tuning import fp4_gemm

    class Native(EmulatedNVFP4):
        kernel = "native"
        alpha = 1.0

        def multiply(self, operand: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> torch.Tensor:
            return super().multiply(operand, bias) * self.alpha

    packed_linear = registry.packed_linear
    monkeypatch.setattr(machine, "device", lambda: Device("NVIDIA B200", (10, 0)))
    provided: list[bool] = []

    def environment(own_quantizer: bool) -> Environment:
        provided.append(own_quantizer)
        return Environment(None, own_quantizer)

    monkeypatch.setattr(fp4, "environment", environment)
    tuned: list[tuple[set[type], int]] = []

    def tune(linears: list[object], most_rows: int, _: object) -> fp4_gemm.Tuned:
        tuned.append(({type(linear) for linear in linears}, most_rows))
        return fp4_gemm.Tuned(4, 8192, 1.25)

    monkeypatch.setattr(fp4, "fp4_gemm_measuring", lambda _: nullcontext())
    monkeypatch.setattr(batches, "most_prefill_rows", lambda _: 8192)
    monkeypatch.setattr(fp4_gemm, "tune", tune)
    monkeypatch.setattr(
        "mixquant_sglang.layers.packed.packed_linear", lambda p, k: Native if k == "native" else packed_linear(p, k)
    )
    made = bf16_tensors()
    folder = save(tmp_path / "ready", *tiny.compressed_tensors(made))
    with caplog.at_level(logging.INFO):
        Model(monkeypatch, folder, made).load().finish()
    shapes = "mixquant: native nvfp4 agrees with the emulated kernel for 4 shapes (worst relative error 0)"
    messages = [record.getMessage() for record in caplog.records]
    assert provided == [True] and tuned == [({Native}, 8192)]
    tactics = messages.index("mixquant: FlashInfer chose FP4 GEMMs for 4 shapes and up to 8192 rows in 1.2 s")
    assert messages.index(shapes) > tactics  # the check runs the GEMMs that will serve
    Native.alpha = 1.05
    with pytest.raises(
        SystemExit, match=r"disagree on model\.layers\.0\.self_attn\.qkv_proj, \[128, 64\] with 16 rows"
    ):
        Model(monkeypatch, folder, made).load().finish()
    monkeypatch.setattr(fp4, "fp4_gemm_measuring", lambda _: None)
    Model(monkeypatch, folder, made, rules="verify: false\n").load().finish()
    assert len(tuned) == 2
