"""Code of SGLang that multiplies by a BF16 weight itself: in BF16 passes alone."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from mixquant_sglang import recipe
from mixquant_sglang.host import config
from mixquant_sglang.host.hooks import bypasses as hooks
from mixquant_sglang.host.hooks import registry
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.rows import EagerRows
from mixquant_sglang.layers import bypasses
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.layers.outputs import ReadRows
from mixquant_sglang.layers.packed import PackedLinearMethod
from mixquant_sglang.passes.running import DECODE_PASS, Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device, select

CPU = torch.device("cpu")
LOW = Pass(Role.PROMPT)
PROTECTING = Pass(Role.PROMPT, EagerRows(5, ((4, 5),), CPU))


class Linear(torch.nn.Module):
    """A linear of ours, [N, K], or of SGLang's without a recipe's name."""

    def __init__(self, name: str | None, n: int = 32, k: int = 64) -> None:
        super().__init__()
        self.quant_method: Any = UnquantizedLinearMethod()
        if name is not None:
            asked = recipe.load(name)
            run = Runtime(asked, select(asked, Device("this CPU", None)))
            self.quant_method = MixQuantLinearMethod(run, "a.linear", run.selection.prefill, run.selection.decode)
        self.quant_method.create_weights(self, k, [n], k, n, torch.bfloat16, weight_loader=None)
        torch.manual_seed(n)
        self.weight.data = torch.randn(n, k, dtype=torch.bfloat16) * 0.05
        self.quant_method.process_weights_after_loading(self)
        self.bias = None

    def forward(self, x: Any) -> tuple[torch.Tensor, None]:
        return self.quant_method.apply(self, x), None


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize(
    ("name", "running", "left"),
    [
        (None, LOW, True),
        ("nvfp4-emulated", DECODE_PASS, True),
        ("nvfp4-emulated", LOW, False),
        ("nvfp4-emulated", PROTECTING, False),
        ("nvfp4-everywhere", DECODE_PASS, False),
        ("nvfp4-everywhere", LOW, False),
    ],
)
def test_what_is_left_to_sglang(name: str | None, running: Pass, left: bool) -> None:
    linear = Linear(name)
    asked: list[object] = []

    def stock(*args: object) -> bool:
        asked.append(args)
        return True

    with scope(running):
        assert bypasses.left_to_sglang(linear, X) == left
        assert hooks.can_run_dual_gemm(stock, "dual gemm", X, linear) == left
        assert not bypasses.left_to_sglang(linear, ReadRows(X, 9))
        multiplied = hooks.run_fused_a_gemm(lambda layer, x, **more: (x @ layer.weight.T, more), linear, X, backend="a")
    assert asked == ([("dual gemm", X, linear)] if left else [])
    assert isinstance(multiplied, tuple) == left


def test_what_sglang_says_stays() -> None:
    assert not hooks.can_run_dual_gemm(lambda *_: False, "dual gemm", X, Linear("nvfp4-emulated"))


@pytest.mark.parametrize("running", [DECODE_PASS, LOW, PROTECTING])
def test_mla_projections_of_few_rows(monkeypatch: pytest.MonkeyPatch, running: Pass) -> None:
    """SGLang's own function around its kernel."""
    from sglang.kernels.ops.gemm import fused_a_gemm

    ran: list[torch.Size] = []

    def kernel(x: torch.Tensor, weight: torch.Tensor, **_: object) -> torch.Tensor:
        ran.append(weight.shape)
        return x @ weight

    monkeypatch.setattr(fused_a_gemm, "dsv3_fused_a_gemm", kernel)
    linear = Linear("nvfp4-emulated")
    stock = inspect.unwrap(fused_a_gemm.linear_with_fused_a_gemm)
    with scope(running):
        y = hooks.run_fused_a_gemm(stock, linear, X, backend="auto")
        assert torch.equal(y, linear(X)[0])
    assert ran == ([torch.Size((64, 32))] if running is DECODE_PASS else [])
    assert torch.equal(y, F.linear(X, linear.weight)) == (running is DECODE_PASS)


@pytest.mark.parametrize("names", [("nvfp4-emulated", "nvfp4-emulated"), ("nvfp4-emulated", None)])
def test_input_projections_in_one(monkeypatch: pytest.MonkeyPatch, names: tuple[str | None, str | None]) -> None:
    """Qwen3.5's block, SGLang's own class; 0.5.17 has no weight of both."""
    from sglang.srt.models import qwen3_5

    block: Any = qwen3_5.Qwen3_5GatedDeltaNet.__new__(qwen3_5.Qwen3_5GatedDeltaNet)
    torch.nn.Module.__init__(block)
    block.in_proj_qkvz, block.in_proj_ba = Linear(names[0], 32), Linear(names[1], 16)
    if not hasattr(block, "finalize_fused_in_proj"):
        assert "_fused_in_proj_weight" not in inspect.getsource(qwen3_5) and bypasses.guard(block) == 0
        return
    block.alt_stream = block._fused_in_proj_weight = block._fused_in_proj_scale = None
    block._fused_input_proj_cpu_enabled = SimpleNamespace(value=False)
    separate = [block.in_proj_qkvz(X)[0], block.in_proj_ba(X)[0]]
    monkeypatch.setattr(qwen3_5, "_is_cuda", True)
    monkeypatch.setattr(qwen3_5, "check_cuda_graph_backend", lambda *_: False)
    monkeypatch.setattr(qwen3_5, "get_lora", lambda: SimpleNamespace(enable_lora=False, lora_paths=None))
    multiplied: list[torch.Size] = []

    def dispatch(x: torch.Tensor, weight: torch.Tensor, _bias: None) -> torch.Tensor:
        multiplied.append(weight.shape)
        return F.linear(x, weight)

    monkeypatch.setattr(qwen3_5, "bf16_gemm_dispatch", dispatch)
    block.finalize_fused_in_proj()
    assert block._fused_in_proj_weight is not None
    with scope(LOW):
        block._forward_input_proj(X)
    assert multiplied == [torch.Size((48, 64))]  # what is to be mended: a low pass in BF16
    multiplied.clear()
    assert bypasses.guard(block) == 1
    for running in (LOW, PROTECTING):
        with scope(running):
            low = block._forward_input_proj(X)
            assert multiplied == [] and torch.equal(low[0], block.in_proj_qkvz(X)[0])
            assert torch.equal(low[1], block.in_proj_ba(X)[0]) and not torch.equal(low[0], separate[0])
    block._forward_input_proj(X)
    assert multiplied == [torch.Size((48, 64))] and block._fused_in_proj_weight is not None


def test_blocks_without_a_linear_of_ours_stay() -> None:
    block: Any = torch.nn.Module()
    block.in_proj_qkvz, block.in_proj_ba, block._fused_in_proj_weight = Linear(None), Linear(None), X
    assert bypasses.guard(block) == 0


def test_every_way_to_multiply_is_ours() -> None:
    """A way that SGLang adds to its BF16 method would pass ours by."""
    ways = {name for name, what in vars(UnquantizedLinearMethod).items() if name[0] != "_" and inspect.isfunction(what)}
    assert {"apply", "create_weights"} <= ways <= {*vars(MixQuantLinearMethod), *vars(PackedLinearMethod)}


def test_an_addend() -> None:
    linear, addend = Linear("nvfp4-emulated"), torch.ones(5, 32, dtype=torch.bfloat16)
    method = linear.quant_method
    for running in (LOW, PROTECTING):
        with scope(running):
            assert torch.equal(method.apply_with_addend(linear, X, addend.clone()), method.apply(linear, X) + addend)
    if hasattr(UnquantizedLinearMethod, "apply_with_addend"):
        stock = Linear(None).quant_method.apply_with_addend(linear, X, addend.clone())
        assert torch.equal(method.apply_with_addend(linear, X, addend.clone()), stock)


def test_a_weight_that_moved_ends_the_start() -> None:
    linear, other = Linear("nvfp4-emulated"), Linear(None)
    with pytest.raises(SystemExit, match=r"moved the weight of a\.linear into another module, Linear, .*match: a\."):
        linear.quant_method.process_weights_after_loading(other)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a rule", "layers:\n  - {match: 're:.*down_proj', decode: nvfp4}"),
        ("all layers", "decode: {precision: nvfp4}"),
    ],
)
def test_min_tokens_needs_bf16_decode_in_all_layers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, name: str, text: str
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"version: 1\nprefill: {{precision: nvfp4, min_tokens: 9}}\n{text}\n")
    monkeypatch.setenv(recipe.RECIPE_ENV, str(file))
    monkeypatch.setattr(registry, "check_hooks_took_effect", lambda *_: None)
    who = "some" if name == "a rule" else "them"
    with pytest.raises(SystemExit, match=rf"prefill.min_tokens.* the recipe decodes {who} in nvfp4"):
        config.MixQuantConfig()
