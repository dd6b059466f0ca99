"""Gemma's blocks: zero-centred norms, GELU, norms behind attention and MLP, and an MLP that runs on picked rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.kernels.rows import row_numbers
from mixquant_sglang.passes.running import DECODE_PASS, Pass, current, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device, select
from tests.sglang import test_fusion as llama
from tests.sglang.test_fusion import (
    BATCHES,
    DEVICES,
    H200,
    HIDDEN,
    ON_CPU,
    OTHERS,
    PROTECTED,
    ROWS,
    TOKENS,
    WIDE,
    Results,
    eager,
    inputs,
    last_rows,
    sampled,
)

machine = pytest.importorskip("mixquant_sglang.versions.machine")
exact = llama.exact  # the fixture


class Linear(llama.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x), None


def norm(device: str) -> torch.nn.Module:
    from sglang.srt.layers.layernorm import Gemma3RMSNorm

    made: torch.nn.Module = Gemma3RMSNorm(HIDDEN)
    made.weight.data = (0.2 * torch.randn(HIDDEN)).to(torch.bfloat16).to(device)
    return made


def block(name: str, device: str, on: Device | None = None, **changes: object) -> Any:
    """The modules of a Gemma-3 decoder layer that we look at, of SGLang's own types, without attention.

    ``on``: the GPU that kernels are selected for, if it is not the one that is here."""
    from sglang.srt.layers.activation import GeluAndMul
    from sglang.srt.models.gemma3_causal import Gemma3Attention, Gemma3DecoderLayer, Gemma3MLP

    asked = replace(recipe.load(name), **changes)
    run = Runtime(asked, select(asked, on or machine.device()))
    torch.manual_seed(0)
    layer, mlp, attention = (cls.__new__(cls) for cls in (Gemma3DecoderLayer, Gemma3MLP, Gemma3Attention))
    for module in (layer, mlp, attention):
        torch.nn.Module.__init__(module)
    mlp.gate_up_proj = Linear(run, "gate_up_proj", 2 * WIDE, HIDDEN, device)
    mlp.act_fn = GeluAndMul()
    mlp.down_proj = Linear(run, "down_proj", HIDDEN, WIDE, device)
    attention.qkv_proj = Linear(run, "qkv_proj", 2 * HIDDEN, HIDDEN, device)
    attention.o_proj = Linear(run, "o_proj", HIDDEN, HIDDEN, device)
    layer.self_attn, layer.mlp = attention, mlp
    for each in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        setattr(layer, f"{each}_layernorm", norm(device))
    return layer


def causal_lm(layer: Any, device: str = "cpu") -> Any:
    from sglang.srt.models.gemma3_causal import Gemma3ForCausalLM

    model = Gemma3ForCausalLM.__new__(Gemma3ForCausalLM)
    torch.nn.Module.__init__(model)
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity(), layer])
    model.model.norm = norm(device)
    return model


def forward(model: Any, x: torch.Tensor, residual: torch.Tensor, running: Pass) -> Results:
    """The last layer and the final norm as SGLang runs them; each row attends to itself and the rows before it."""
    layer = model.model.layers[-1]
    with scope(running):
        y, residual = layer.input_layernorm(x.clone(), residual.clone())
        q, k, v = layer.self_attn.qkv_proj(y)[0].split([HIDDEN, HIDDEN // 2, HIDDEN // 2], dim=-1)
        scores = q.double() @ torch.cat([k, k], dim=-1).double().t()
        mask = torch.ones_like(scores, dtype=torch.bool).tril()
        attended = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ torch.cat([v, v], dim=-1).double()
        o = layer.post_attention_layernorm(layer.self_attn.o_proj(attended.to(torch.bfloat16))[0])
        y, residual = layer.pre_feedforward_layernorm(o, residual)
        y = layer.post_feedforward_layernorm(layer.mlp(y))
        assert current() is running
        normed, _ = model.model.norm(y, residual)
    return Results(torch.cat([k, v], dim=-1), normed)


def outputs(layer: Any, running: Pass, device: str) -> list[torch.Tensor]:
    """qkv of the first norm; what the MLP makes of the third, and the residual."""
    torch.manual_seed(1)
    x, residual = (torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device) for _ in range(2))
    with scope(running):
        qkv, _ = layer.self_attn.qkv_proj(layer.input_layernorm(x.clone()))
        y, residual = layer.pre_feedforward_layernorm(x.clone(), residual)
        return [qkv, layer.mlp(y), residual]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_fused_equals_unfused(name: str, device: str) -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block(name, device)
    passes = [Pass(Role.PROMPT), Pass(Role.PROMPT, eager(ROWS, torch.device(device))), DECODE_PASS]
    plain = [outputs(layer, running, device) for running in passes]
    emulated_fp8 = name == "fp8" and device == "cpu"  # quantises by itself
    assert fuse(layer) == (Counter() if emulated_fp8 else Counter(RMSNorm=2, GELU=1))
    fused = [outputs(layer, running, device) for running in passes]
    for before, after in zip(plain[2], fused[2], strict=True):
        assert torch.equal(before, after)  # decode, always
    for before, after in zip(plain[0] + plain[1], fused[0] + fused[1], strict=True):
        if device == "cpu":
            assert torch.equal(before, after)
        else:  # rarely one code; SGLang's tanh may be good to 2^-11 alone, which moves more of the MLP's
            error = (before.double() - after.double()).norm() / before.double().norm()
            assert error < (3e-2 if after.shape == (TOKENS, HIDDEN) else 2e-3)
    for before, after in zip(fused[0][:2], fused[1][:2], strict=True):
        assert not torch.equal(before[PROTECTED], after[PROTECTED])
    assert torch.equal(fused[0][0][OTHERS], fused[1][0][OTHERS])


@ON_CPU
def test_the_norms_behind_attention_and_mlp_stay_bf16() -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block("nvfp4-emulated", "cpu")
    fuse(layer)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    with scope(Pass(Role.PROMPT)):
        assert isinstance(layer.input_layernorm(x), QuantizedActivations)
        assert isinstance(layer.post_attention_layernorm(x), torch.Tensor)
        assert isinstance(layer.post_feedforward_layernorm(x), torch.Tensor)


def test_what_is_not_fused() -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block("nvfp4-emulated", "cpu")
    layer.mlp.act_fn.approximate = "none"
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.float()
    layer.pre_feedforward_layernorm._forward_method = lambda x, residual: (x, residual)
    assert not fuse(layer)


def pair(name: str, *, protect: bool, fused: bool, change: Callable[[Any], None] | None = None) -> llama.Pair:
    from mixquant_sglang.layers.fused import fuse
    from mixquant_sglang.layers.last_layer import prune_last_layer

    models = []
    for _ in range(2):
        options = {"protect_last_prompt_token": protect, "scales": "absmax"}
        layer = block(name, "cpu", H200 if name == "fp8" else None, **options)
        if change:
            change(layer)
        if fused:
            fuse(layer)
        models.append(causal_lm(layer))
    assert prune_last_layer(models[1])
    run = models[1].model.layers[-1].mlp.down_proj.quant_method._runtime
    run.schedule.prunes = True
    return llama.Pair(*models, run)


def same_where_kept(both: llama.Pair, planned: Any, kept: list[int], x: tuple[torch.Tensor, torch.Tensor]) -> None:
    whole = forward(both.whole, *x, replace(planned.running, read=None))
    pruned = forward(both.pruned, *x, planned.running)
    assert torch.equal(pruned.keys_and_values, whole.keys_and_values)
    assert torch.equal(pruned.normed[kept], whole.normed[kept])
    low = forward(both.whole, *x, Pass(Role.PROMPT))
    high = {*row_numbers(planned.protected).tolist()} & {*kept}
    assert all(not torch.equal(pruned.normed[i], low.normed[i]) for i in high)
    read = planned.running.read.index.tolist()
    assert not pruned.normed[[i for i in range(len(x[0])) if i not in read]].any()


@ON_CPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_the_mlp_runs_the_rows_that_are_read(name: str, protect: bool, fused: bool, batch: str) -> None:
    both, requests = pair(name, protect=protect, fused=fused), BATCHES[batch]
    planned = both.run.schedule.prefill(requests, torch.device("cpu"))
    kept = sampled(requests) if protect else last_rows(requests)
    same_where_kept(both, planned, kept, inputs(sum(r.new for r in requests)))


@ON_CPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kept_high", ["self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "self_attn.qkv_proj"])
@pytest.mark.parametrize("protect", [False, True])
def test_with_a_linear_in_bf16(kept_high: str, protect: bool) -> None:
    def change(layer: Any) -> None:
        layer.get_submodule(kept_high).quant_method.precision = dict.fromkeys(Role, "bf16")

    both, requests = pair("fp8", protect=protect, fused=True, change=change), BATCHES["several"]
    planned = both.run.schedule.prefill(requests, torch.device("cpu"))
    x = inputs(sum(r.new for r in requests))
    whole = forward(both.whole, *x, replace(planned.running, read=None))
    pruned = forward(both.pruned, *x, planned.running)
    kept = sampled(requests) if protect else last_rows(requests)
    assert torch.equal(pruned.normed[kept], whole.normed[kept])


@ON_CPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("protect", [False, True])
def test_where_all_rows_are_read_nothing_is_left_out(protect: bool) -> None:
    both = pair("nvfp4-emulated", protect=protect, fused=True)
    planned = both.run.schedule.prefill(BATCHES["several"], torch.device("cpu"), reads_all=True)
    for running in (planned.running, DECODE_PASS):
        x = inputs(sum(r.new for r in BATCHES["several"]))
        whole, pruned = (forward(model, *x, running) for model in (both.whole, both.pruned))
        assert torch.equal(pruned.keys_and_values, whole.keys_and_values) and torch.equal(pruned.normed, whole.normed)


@ON_CPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_rows_that_a_captured_graph_reads(name: str, protect: bool) -> None:
    """One graph of 24 rows replays passes of fewer: the rows beyond are padding, and most slots are not in use."""
    both = pair(name, protect=protect, fused=True)
    captured = both.run.graphs.captured_pass(24, 64, torch.device("cpu"))
    for requests in (BATCHES["several"], BATCHES["rows in bf16"], BATCHES["middle chunk"], BATCHES["several"][::-1]):
        planned = both.run.schedule.prefill(requests, torch.device("cpu"))
        if not both.run.graphs.can_replay(planned):
            continue
        both.run.graphs.load(planned)
        tokens = sum(r.new for r in requests)
        x, residual = inputs(tokens)
        padded = [torch.cat([part, torch.full((24 - tokens, HIDDEN), 7.0).bfloat16()]) for part in (x, residual)]
        whole = forward(both.whole, x, residual, replace(planned.running, read=None))
        pruned = forward(both.pruned, *padded, captured)
        kept = sampled(requests) if protect else last_rows(requests)
        assert torch.equal(pruned.normed[kept], whole.normed[kept])
        assert torch.equal(pruned.keys_and_values[:tokens], whole.keys_and_values)
        assert bool(pruned.normed.isfinite().all())


@ON_CPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("protect", [False, True])
def test_how_often_and_on_how_many_rows_the_mlp_runs(protect: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice where rows in BF16 are among low ones, and what is given by position goes along."""
    both = pair("fp8", protect=protect, fused=True)
    mlp, calls = both.pruned.model.layers[-1].mlp, []
    plain = mlp.forward._forward  # type: ignore[union-attr]

    def counted(x: torch.Tensor, logits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        assert len(scale) == 3 and torch.equal(x[:, :1] * 0 + logits[:, None].to(x.dtype), logits[:, None].to(x.dtype))
        calls.append((current().role, logits.tolist()))
        assert current().rows is None and current().read is None
        return plain(x)  # type: ignore[no-any-return, operator]

    monkeypatch.setattr(mlp.forward, "_forward", counted)
    for batch, protected, low in (("several", [3, 8, 11], [3, 8, 11]), ("rows in bf16", None, None)):
        calls.clear()
        running = both.run.schedule.prefill(BATCHES[batch], torch.device("cpu")).running
        tokens = sum(r.new for r in BATCHES[batch])
        with scope(running):
            mlp(inputs(tokens)[0], torch.arange(float(tokens)), torch.ones(3))
        if protected is not None:
            expected = [(Role.PROTECTED, protected)] if protect else [(Role.PROMPT, low)]
            assert calls == expected
        else:
            assert running.read is not None
            rows = [float(row) for row in running.read.index]
            roles = [Role.PROTECTED] if running.read is running.rows else [Role.PROMPT, Role.PROTECTED]
            assert calls == [(role, rows) for role in roles]


@pytest.mark.gpu
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_a_captured_graph_of_the_last_layer(name: str, protect: bool) -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block(name, "cuda", protect_last_prompt_token=protect)
    fuse(layer)
    llama.replays_equal_the_whole_layer(causal_lm(layer, "cuda"), forward, protect)
