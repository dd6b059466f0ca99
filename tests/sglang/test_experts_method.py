"""The method of a MoE layer by itself: which rows take which experts, and updates of single experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang import recipe
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.rows import EagerRows
from mixquant_sglang.passes.running import DECODE_PASS, Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device, select

CPU = torch.device("cpu")
EXPERTS, INNER, HIDDEN, TOKENS = 4, 32, 64, 7


class Silu:
    """SGLang's asks for a server's arguments."""

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


def make(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Runtime, Any]:
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig

    from mixquant_sglang.layers.experts import MixQuantExpertsMethod

    monkeypatch.setattr(fused_moe_native, "SiluAndMul", Silu)
    asked = recipe.load(name)
    run = Runtime(asked, select(asked, Device("this CPU", None)))
    precisions = run.selection.prefill, run.selection.decode
    method = MixQuantExpertsMethod(run, "model.layers.0.mlp.experts", *precisions, flags=(False, False, False))
    layer: Any = torch.nn.Module()
    layer.num_experts = EXPERTS
    layer.moe_runner_config = MoeRunnerConfig(num_experts=EXPERTS, num_local_experts=EXPERTS, top_k=2)
    method.create_weights(layer, EXPERTS, HIDDEN, INNER, torch.bfloat16, weight_loader=None)
    method.create_moe_runner(layer, layer.moe_runner_config)
    torch.manual_seed(0)
    layer.w13_weight.data.normal_()
    layer.w2_weight.data.normal_()
    layer.quant_method = method
    method.process_weights_after_loading(layer)
    run.weights.finish_load()
    return run, layer


def apply(layer: Any, running: Pass) -> torch.Tensor:
    """Without logits of the router, as routers of SGLang that pick by themselves leave them out."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    random = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=random).bfloat16()
    ids = torch.rand(TOKENS, EXPERTS, generator=random).topk(2).indices.int()
    weights = torch.rand(TOKENS, 2, generator=random)
    with scope(running):
        dispatched = StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, None))
        out: torch.Tensor = layer.quant_method.apply(layer, dispatched).hidden_states
        return out


@pytest.mark.parametrize("name", ["fp8", "nvfp4-emulated"])
def test_protected_rows_are_stocks_and_the_others_low(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, layer = make(monkeypatch, name)
    stock, low = apply(layer, DECODE_PASS), apply(layer, Pass(Role.PROMPT))
    assert not bool((stock == low).all(dim=1).any())
    for ranges in (((2, 3), (6, 7)), ((0, TOKENS),)):
        protected = [row for start, stop in ranges for row in range(start, stop)]
        others = [row for row in range(TOKENS) if row not in protected]
        out = apply(layer, Pass(Role.PROMPT, EagerRows(TOKENS, ranges, CPU)))
        assert torch.equal(out[protected], stock[protected]) and torch.equal(out[others], low[others])


@pytest.mark.parametrize("name", ["fp8", "nvfp4-emulated"])
def test_an_update_of_one_expert(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run, layer = make(monkeypatch, name)
    low = apply(layer, Pass(Role.PROMPT))
    tensors = layer.quant_method.copy_in(run.selection.prefill).tensors()
    others = [tensor[[0, 1, 3]].view(torch.uint8).clone() for tensor in tensors]
    run.weights.hold("an update")
    layer.w13_weight.data[2] *= -3
    run.weights.written()
    assert layer.quant_method.stale and run.weights.refresh() is None and not layer.quant_method.stale
    assert not torch.equal(apply(layer, Pass(Role.PROMPT)), low)
    for tensor, before in zip(tensors, others, strict=True):  # in place
        assert torch.equal(tensor[[0, 1, 3]].view(torch.uint8), before)
    layer.w2_weight.data[1, 0, 0] = float("nan")
    run.weights.changed()
    assert "NaN" in (run.weights.refresh() or "") and not run.weights.current
    layer.w2_weight.data[1] = 0  # an expert of zeros
    run.weights.changed()
    assert run.weights.refresh() is None and bool(apply(layer, Pass(Role.PROMPT)).isfinite().all())
