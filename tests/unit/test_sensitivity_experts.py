"""`mixquant sensitivity` of mixtures of experts: the experts of a layer are measured, priced and picked as one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.kernels.experts.base import Form, Masters, PackedExperts
from mixquant_sglang.kernels.experts.emulated import EmulatedFP8Experts, EmulatedNVFP4Experts
from mixquant_sglang.recipe.matching import RuleMatcher
from mixquant_sglang.recipe.modules import FUSED
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.tools.plan.gpus import find_gpu
from mixquant_sglang.tools.plan.models import find_model
from mixquant_sglang.tools.plan.predict import predict
from mixquant_sglang.tools.plan.recipes import make_plan
from mixquant_sglang.tools.plan.workload import Workload
from mixquant_sglang.tools.sensitivity import measure as sensitivity
from mixquant_sglang.tools.sensitivity.choice import Prices, groups_of
from mixquant_sglang.tools.sensitivity.kl import KL, Group
from mixquant_sglang.tools.sensitivity.report import as_yaml
from tests.support import tiny_models
from tests.support.words import save_tokenizer
from tests.unit.test_sensitivity import arguments, measurement

EXPERTS = "model.layers.{}.mlp.experts"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = tiny_models.make(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    save_tokenizer(folder, 128)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = torch.Generator().manual_seed(1)
    lines = []
    for n in (40, 25):
        words = " ".join(f"w{i}" for i in torch.randint(128, (n,), generator=random).tolist())
        lines.append(json.dumps({"text": words}))
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("\n".join(lines))
    return file


def group(layer: int, precision: str = "nvfp4") -> Group:
    return Group(EXPERTS.format(layer), "mlp.experts", layer, (), precision)


@pytest.mark.parametrize(("precision", "kernel"), [("nvfp4", EmulatedNVFP4Experts), ("fp8", EmulatedFP8Experts)])
def test_emulation_is_that_of_the_kernel(model: Path, data: Path, precision: str, kernel: type[PackedExperts]) -> None:
    measured = measurement(model, data, [group(0, precision)])
    module: Any = measured._model.model.layers[0].mlp.experts
    seen: list[Any] = []
    with measured._running(group(0, precision), measured.pack(group(0, precision))), torch.inference_mode():
        handle = module.register_forward_hook(lambda _, inputs, out: seen.append((*inputs, out.clone())))
        measured._hidden(measured._prompts[0])
        handle.remove()
        x, ids, weights, out = seen[0]
    assert measured._low == 32
    masters = Masters(module.gate_up_proj.detach().bfloat16(), module.down_proj.detach().bfloat16())
    packed = kernel(masters, Form("silu"), scales="search")
    expected = packed.run(x[:32].bfloat16().contiguous(), weights[:32].float(), ids[:32].int()).float()
    with torch.inference_mode():
        stock = module(x, ids, weights)
    assert torch.equal(out[:32], expected) and torch.equal(out[32:], stock[32:])
    assert not torch.equal(expected, stock[:32])
    assert not module._forward_hooks


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_zeros_are_exact(model: Path, data: Path, device: str) -> None:
    groups = [group(layer) for layer in range(2)]
    measured = measurement(model, data, groups, device=device)
    assert measured.kl({}) == KL(0.0, 0.0)
    first, last = (measured.kl({one: measured.pack(one)}) for one in groups)
    assert first.answer > 0 and first.prompt > 0
    assert last.answer == 0 and last.prompt > 0  # of the last layer, a BF16 row reads the others' keys and values alone
    assert measured.kl({}) == KL(0.0, 0.0)  # the hooks are gone


def test_groups_are_what_the_recipe_makes_low(tmp_path: Path) -> None:
    shape = find_model("Qwen3-30B-A3B")
    gpu = find_gpu("H200")
    fp8 = recipe.load("fp8")
    groups = groups_of(fp8, select(fp8, Device(gpu.name, gpu.capability)), shape)
    assert len(groups) == 3 * 48 and sum(not one.members for one in groups) == 48
    assert groups[2] == Group("model.layers.0.mlp.experts", "mlp.experts", 0, (), "fp8")
    file = tmp_path / "r.yaml"
    file.write_text(fp8.to_yaml() + "layers:\n  - {match: 're:.*[0-9]\\.mlp\\.experts$', prefill: bf16}\n")
    ruled = recipe.load(str(file))
    assert len(groups_of(ruled, select(ruled, Device(gpu.name, gpu.capability)), shape)) == 2 * 48


def test_prices_are_those_of_plan() -> None:
    shape, gpu, fp8 = find_model("Qwen3-30B-A3B"), find_gpu("H200"), recipe.load("fp8")
    selection = select(fp8, Device(gpu.name, gpu.capability))
    groups = groups_of(fp8, selection, shape)
    prices, work = Prices(shape, gpu, fp8, selection, 8192), Workload(8192)
    low, bf16 = (predict(make_plan(name, shape, gpu), shape, gpu, work) for name in ("fp8", "bf16"))
    assert prices.speed(groups, []) == pytest.approx((low.prefill_ms, low.prefill_speedup))
    assert prices.speed(groups, groups) == pytest.approx((bf16.prefill_ms, 1.0))
    assert prices.gain(groups[2]) > prices.gain(groups[0]) > 0  # experts gain more than q, k and v
    with pytest.raises(MixQuantError, match=r"--priced-as: Qwen3-8B has no model\.layers\.0\.mlp\.experts"):
        Prices(find_model("Qwen3-8B"), gpu, fp8, selection, 8192).gain(groups[2])


def test_the_recipe_names_experts(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(model, data, "--gpu", "H200", "--recipe", "fp8", "--priced-as", "Qwen3-30B-A3B", "--budget", "60%")
    result = sensitivity.measure(args)
    assert [one.group.name for one in result.groups] == [
        f"model.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.experts")
    ]
    assert result.runs["bf16"].kl == KL(0.0, 0.0)
    assert result.runs["result"].kl.answer < result.runs["recipe"].kl.answer
    kept = {name for name in result.kept if name.endswith("experts")}
    assert kept and len(result.kept) < len(result.groups)
    made = as_yaml(result)
    assert r"mlp\.experts" in made and "6 linears and layers of experts kept in BF16" in made
    file = model / "made.yaml"
    file.write_text(made)
    matcher = RuleMatcher(recipe.load(str(file)).layers, FUSED)
    for one in result.groups:
        expected = "bf16" if one.group.name in result.kept else "fp8"
        assert matcher.precisions(one.group.name, "fp8", "bf16")[0] == expected
    assert sensitivity.run(args) == 0
    assert "each linear and layer of experts alone" in capsys.readouterr().out
