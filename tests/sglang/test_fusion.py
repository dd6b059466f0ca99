"""Quantisation fused into SGLang's norms and activations: the linears' results stay, to the bit where torch does it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang import recipe
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.linear.emulated_nvfp4 import EmulatedNVFP4
from mixquant_sglang.kernels.operands import QuantizedActivations
from mixquant_sglang.kernels.rows import CapturedRows, EagerRows, row_numbers
from mixquant_sglang.kernels.tuning import fp8_gemm
from mixquant_sglang.passes.rows import RequestRows, RowSplit, split_rows
from mixquant_sglang.passes.running import DECODE_PASS, MASTER_PASS, PROTECTED_PASS, Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device, select

machine = pytest.importorskip("mixquant_sglang.versions.machine")

# SGLang's norms take one kind of tensor for a process: CUDA's where there is a GPU.
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="SGLang's norms run on the GPU that is here")
DEVICES = [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, HIDDEN, WIDE = 9, 64, 160
ROWS = split_rows([RequestRows(4, 0, 4), RequestRows(4, 0, 90), RequestRows(1, 5, 4, True)], last_prompt_token=True)
PROTECTED, OTHERS = [3, 8], [0, 1, 2, 4, 5, 6, 7]


def eager(rows: RowSplit, device: torch.device) -> EagerRows:
    return EagerRows(rows.total, rows.protected, device)


class Linear(torch.nn.Module):
    def __init__(self, run: Runtime, name: str, n: int, k: int, device: str) -> None:
        from mixquant_sglang.layers.linear import MixQuantLinearMethod

        super().__init__()
        self.quant_method = MixQuantLinearMethod(run, name, run.selection.prefill, run.selection.decode)
        self.quant_method.create_weights(self, k, [n], k, n, torch.bfloat16, weight_loader=None)
        self.weight.data = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.05
        self.quant_method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor | QuantizedActivations) -> torch.Tensor:
        return self.quant_method.apply(self, x)


def rmsnorm(device: str) -> torch.nn.Module:
    from sglang.srt.layers.layernorm import RMSNorm

    norm = RMSNorm(HIDDEN, eps=1e-6)
    norm.weight.data = (1 + 0.1 * torch.randn(HIDDEN)).to(torch.bfloat16).to(device)
    return norm


def block(name: str, device: str, on: Device | None = None, **changes: object) -> torch.nn.Module:
    """The modules of a Qwen3 decoder layer that fusion looks at, of SGLang's own types, without attention.

    ``on``: the GPU that kernels are selected for, if it is not the one that is here."""
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.models.qwen2 import Qwen2MLP
    from sglang.srt.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer

    asked = replace(recipe.load(name), **changes)
    run = Runtime(asked, select(asked, on or machine.device()))
    torch.manual_seed(0)
    layer, mlp, attention = (cls.__new__(cls) for cls in (Qwen3DecoderLayer, Qwen2MLP, Qwen3Attention))
    for module in (layer, mlp, attention):
        torch.nn.Module.__init__(module)
    act = SiluAndMul.__new__(SiluAndMul)  # its constructor asks for server arguments
    super(SiluAndMul, act).__init__()
    mlp.gate_up_proj, mlp.act_fn = Linear(run, "gate_up_proj", 2 * WIDE, HIDDEN, device), act
    mlp.down_proj = Linear(run, "down_proj", HIDDEN, WIDE, device)
    layer.self_attn = attention
    attention.q_size = HIDDEN
    attention.qkv_proj = Linear(run, "qkv_proj", 2 * HIDDEN, HIDDEN, device)
    attention.o_proj = Linear(run, "o_proj", HIDDEN, HIDDEN, device)
    layer.input_layernorm, layer.post_attention_layernorm = rmsnorm(device), rmsnorm(device)
    layer.mlp = mlp
    return layer


def outputs(layer: torch.nn.Module, running: Pass, device: str) -> list[torch.Tensor]:
    """qkv of the first norm; then gate_up, down and the residual of the second."""
    torch.manual_seed(1)
    x, residual = (torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device) for _ in range(2))
    with scope(running):
        qkv = layer.self_attn.qkv_proj(layer.input_layernorm(x.clone()))
        qkv = torch.cat(qkv.split([HIDDEN, HIDDEN // 2, HIDDEN // 2], dim=-1), dim=-1)
        y, residual = layer.post_attention_layernorm(x.clone(), residual)
        gate_up = layer.mlp.gate_up_proj(y)
        down = layer.mlp.down_proj(layer.mlp.act_fn(gate_up))
    return [qkv, gate_up, down, residual]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_fused_equals_unfused(name: str, device: str) -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block(name, device)
    passes = [Pass(Role.PROMPT), Pass(Role.PROMPT, eager(ROWS, torch.device(device))), DECODE_PASS]
    plain = [outputs(layer, running, device) for running in passes]
    stock = [layer.input_layernorm._forward_method, layer.mlp.act_fn._forward_method]
    emulated_fp8 = name == "fp8" and device == "cpu"  # quantises by itself
    expected = Counter() if emulated_fp8 else Counter(RMSNorm=2, SiLU=1)
    if name == "fp8" and device == "cuda":
        expected["q projections"] = 1
    assert fuse(layer) == expected
    assert emulated_fp8 == ([layer.input_layernorm._forward_method, layer.mlp.act_fn._forward_method] == stock)
    fused = [outputs(layer, running, device) for running in passes]
    for before, after in zip(plain[2], fused[2], strict=True):
        assert torch.equal(before, after)  # decode, always
    for before, after in zip(plain[0] + plain[1], fused[0] + fused[1], strict=True):
        if device == "cpu":
            assert torch.equal(before, after)
        else:  # the order in which a norm sums its squares; rarely one code
            error = (before.double() - after.double()).norm() / before.double().norm()
            assert error < 2e-3
    for before, after in zip(fused[0][:3], fused[1][:3], strict=True):
        assert not torch.equal(before[PROTECTED], after[PROTECTED])
    assert torch.equal(fused[0][0][OTHERS], fused[1][0][OTHERS])


@ON_CPU
@pytest.mark.parametrize("name", ["nvfp4-emulated"])
def test_protected_rows_get_the_norm_that_bf16_gets(name: str) -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block(name, "cpu")
    fuse(layer)
    rows = eager(ROWS, torch.device("cpu"))
    fused = outputs(layer, Pass(Role.PROMPT, rows), "cpu")
    high = outputs(layer, DECODE_PASS, "cpu")
    assert torch.equal(fused[0][PROTECTED], high[0][PROTECTED])
    assert torch.equal(fused[1][PROTECTED], high[1][PROTECTED])
    assert torch.equal(fused[2][PROTECTED], high[2][PROTECTED])


@ON_CPU
def test_whoever_reads_the_missing_matrix_gets_an_error() -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block("nvfp4-emulated", "cpu")
    fuse(layer)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    with scope(Pass(Role.PROMPT)):
        y = layer.input_layernorm(x)
        assert isinstance(y, QuantizedActivations) and y.shape == x.shape and not hasattr(y, "_sglang_some_flag")
        with pytest.raises(TypeError, match=r"linear got activations .* set 'prefill: {fuse: false}'"):
            F.linear(y, layer.self_attn.qkv_proj.weight)
        with pytest.raises(TypeError):
            y + x
        with pytest.raises(TypeError):
            x + y


def test_what_is_not_fused() -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block("nvfp4-emulated", "cpu")
    layer.input_layernorm.cast_x_before_out_mul = True
    layer.post_attention_layernorm.weight.data = layer.post_attention_layernorm.weight.data.float()
    layer.mlp.act_fn._forward_method = lambda x: x
    assert not fuse(layer)
    layer = block("nvfp4-emulated", "cpu")
    layer.mlp.down_proj.quant_method.precision = dict.fromkeys(Role, "bf16")
    assert fuse(layer) == Counter(RMSNorm=2)
    assert not fuse(torch.nn.Sequential(block("nvfp4-emulated", "cpu").mlp.gate_up_proj))


def test_what_is_not_fused_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    from mixquant_sglang.host import report
    from mixquant_sglang.layers.fused import fuse

    def layer() -> Any:
        made = block("nvfp4-emulated", "cpu")
        made.self_attn.attn = RadixAttention(1, 64, 1.0, 1, 0)
        made.self_attn.q_norm = rmsnorm("cpu")
        return made

    special, unknown, partly = layer(), torch.nn.Module(), layer()
    special.input_layernorm.cast_x_before_out_mul = True
    for name, part in layer().named_children():
        unknown.add_module(name, part)
    partly.mlp.gate_up_proj.quant_method.precision = dict.fromkeys(Role, "bf16")
    model = torch.nn.Module()
    model.layers, model.norm = torch.nn.ModuleList([layer(), special, unknown, partly]), rmsnorm("cpu")
    assert fuse(model)["RMSNorm"] == 4
    with caplog.at_level(logging.INFO):
        report.log_unfused(model)
    assert [record.message for record in caplog.records] == [
        "mixquant: not fused (no kernel follows the numbers of this RMSNorm): layers.1.input_layernorm",
        "mixquant: not fused (no row of layers/families.py lets it in Module): layers.2.input_layernorm, "
        "layers.2.post_attention_layernorm",
        "mixquant: not fused (no linear of low precision reads its result alone): layers.3.post_attention_layernorm",
    ]


@ON_CPU
def test_no_rows_and_additions_take_the_plain_norm() -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block("nvfp4-emulated", "cpu")
    fuse(layer)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    with scope(Pass(Role.PROMPT)):
        assert isinstance(layer.input_layernorm(x[:0]), torch.Tensor)
        y, _ = layer.input_layernorm(x, x.clone(), x.clone())
        assert isinstance(y, torch.Tensor)
        gaps = torch.randn(TOKENS, 2 * HIDDEN, dtype=torch.bfloat16)[:, :HIDDEN]
        assert isinstance(layer.input_layernorm(gaps), torch.Tensor)
        y, _ = layer.input_layernorm(x.clone(), gaps)
        assert isinstance(y, torch.Tensor)
        wrong = eager(split_rows([RequestRows(5, 0, 5)], last_prompt_token=True), x.device)
    with scope(Pass(Role.PROMPT, wrong)), pytest.raises(RuntimeError, match="qkv_proj got 9 rows"):
        layer.input_layernorm(x)


@ON_CPU
@pytest.mark.parametrize("running", [PROTECTED_PASS, MASTER_PASS, DECODE_PASS])
def test_a_pass_that_is_bf16_whole_asks_no_linear(running: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones run without a graph, so that the device waits for what the host does in each layer."""
    from mixquant_sglang.layers import fused

    layer = block("nvfp4-emulated", "cpu")
    plain = outputs(layer, running, "cpu")
    fused.fuse(layer)
    monkeypatch.setattr(fused, "_rows", lambda _x: pytest.fail("rows were looked at"))
    monkeypatch.setattr(fused.MixQuantLinearMethod, "fusable", lambda *_: pytest.fail("a linear was asked"))
    for before, after in zip(plain, outputs(layer, running, "cpu"), strict=True):
        assert torch.equal(before, after)


# -- the last layer ----------------------------------------------------------------------------------------------------

H200 = Device("NVIDIA H200", (9, 0))
CHUNK, LAST_CHUNK, DECODING = RequestRows(4, 0, 90), RequestRows(5, 40, 45), RequestRows(1, 9, 4, decoding=True)
RETRACTED, ASKED_BF16 = RequestRows(6, 20, 22), RequestRows(3, 0, 3, bf16=True)
BATCHES = {
    "one prompt": [RequestRows(9, 0, 9)],
    "several": [RequestRows(4, 0, 4), LAST_CHUNK, RequestRows(3, 2, 5)],
    "middle chunk": [CHUNK],
    "middle chunk and others": [LAST_CHUNK, CHUNK, DECODING],
    "rows in bf16": [CHUNK, RETRACTED, ASKED_BF16, DECODING],
}


def last_rows(requests: list[RequestRows]) -> list[int]:
    return [sum(r.new for r in requests[: i + 1]) - 1 for i in range(len(requests))]


def sampled(requests: list[RequestRows]) -> list[int]:
    """The rows whose tokens are kept: the last ones, save those of middle chunks."""
    return [i for i, r in zip(last_rows(requests), requests, strict=True) if r.prefix + r.new >= r.prompt]


def causal_lm(layer: torch.nn.Module, device: str = "cpu") -> torch.nn.Module:
    from sglang.srt.models.qwen3 import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.__new__(Qwen3ForCausalLM)
    torch.nn.Module.__init__(model)
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity(), layer])
    model.model.norm = rmsnorm(device)
    return model


@dataclass(frozen=True)
class Results:
    """What the last layer writes for later passes, [T, HIDDEN], and what the logits are computed from."""

    keys_and_values: torch.Tensor
    normed: torch.Tensor


def forward(model: torch.nn.Module, x: torch.Tensor, residual: torch.Tensor, running: Pass) -> Results:
    """The last layer and the final norm as SGLang runs them; each row attends to itself and the rows before it."""
    layer = model.model.layers[-1]
    with scope(running):
        y, residual = layer.input_layernorm(x.clone(), residual.clone())
        q, k, v = layer.self_attn.qkv_proj(y).split([HIDDEN, HIDDEN // 2, HIDDEN // 2], dim=-1)
        assert (q.is_cuda and torch.cuda.is_current_stream_capturing()) or q.isfinite().all()
        scores = q.double() @ torch.cat([k, k], dim=-1).double().t()
        mask = torch.ones_like(scores, dtype=torch.bool).tril()
        attended = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ torch.cat([v, v], dim=-1).double()
        o = layer.self_attn.o_proj(attended.to(torch.bfloat16))
        y, residual = layer.post_attention_layernorm(o, residual)
        down = layer.mlp.down_proj(layer.mlp.act_fn(layer.mlp.gate_up_proj(y)))
        normed, _ = model.model.norm(down, residual)
    return Results(torch.cat([k, v], dim=-1), normed)


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weight.double().t()
    return (y if bias is None else y + bias.double()).to(torch.bfloat16)


def exact_fp8(x: torch.Tensor, w: torch.Tensor, sx: torch.Tensor, sw: torch.Tensor, _bias: None) -> torch.Tensor:
    return (x.double() @ w.double().t() * sx.double() * sw.double()).to(torch.bfloat16)


def exact_nvfp4(packed: EmulatedNVFP4, operand: tuple[torch.Tensor, ...], _bias: None) -> torch.Tensor:
    (part,), (alpha,) = packed._parts, packed._alphas
    return (operand[0].double() @ part.unscaled(torch.float32).double().t() * alpha).to(torch.bfloat16)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in float64, whose order does not show in BF16: then rows do not depend on how many share a GEMM, to the bit.

    Memory that was not written is NaN, and rows of captured graphs are picked on the CPU."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: object, **kwargs: object) -> torch.Tensor:
        out = new_empty(self, *size, **kwargs)
        return out.fill_(torch.nan) if out.dtype is torch.bfloat16 else out

    def gather(self: CapturedRows, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self.index.clamp(min=0)) * (self.index >= 0)[:, None].to(x.dtype)

    def scatter(self: CapturedRows, out: torch.Tensor, rows: torch.Tensor) -> None:
        out[self.index[self.index >= 0]] = rows[self.index >= 0]

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(CapturedRows, "gather", gather)
    monkeypatch.setattr(CapturedRows, "scatter", scatter)
    monkeypatch.setattr(fp8_gemm, "CANDIDATES", {"exact": exact_fp8})
    monkeypatch.setattr(EmulatedNVFP4, "multiply", exact_nvfp4)
    monkeypatch.setattr(
        UnquantizedLinearMethod, "apply", lambda self, layer, x, bias=None: exact_linear(x, layer.weight, bias)
    )


@dataclass(frozen=True)
class Pair:
    """One model before and after its last layer was pruned."""

    whole: torch.nn.Module
    pruned: torch.nn.Module
    run: Runtime


def pair(name: str, *, protect: bool, fused: bool, change: Callable[[torch.nn.Module], None] | None = None) -> Pair:
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
    return Pair(*models, run)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, HIDDEN).bfloat16()


@ON_CPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_the_last_layer_computes_the_rows_that_are_read(name: str, protect: bool, fused: bool, batch: str) -> None:
    both, requests = pair(name, protect=protect, fused=fused), BATCHES[batch]
    planned = both.run.schedule.prefill(requests, torch.device("cpu"))
    assert planned.running.read is not None
    x = inputs(sum(r.new for r in requests))
    whole = forward(both.whole, *x, replace(planned.running, read=None))
    pruned = forward(both.pruned, *x, planned.running)
    assert torch.equal(pruned.keys_and_values, whole.keys_and_values)
    kept = sampled(requests) if protect else last_rows(requests)
    assert torch.equal(pruned.normed[kept], whole.normed[kept])
    low = forward(both.whole, *x, Pass(Role.PROMPT))
    high = {*row_numbers(planned.protected).tolist()} & {*kept}
    assert all(not torch.equal(pruned.normed[i], low.normed[i]) for i in high)
    assert bool(high) == ((protect and bool(kept)) or "bf16" in batch or "others" in batch)
    read = planned.running.read.index.tolist()
    assert not pruned.normed[[i for i in range(len(x[0])) if i not in read]].any()


@ON_CPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_where_all_rows_are_read_nothing_is_left_out(name: str, protect: bool) -> None:
    """Input logprobs, hidden states; and decode."""
    both = pair(name, protect=protect, fused=True)
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
    assert captured.read is not None and (captured.read is captured.rows) == protect
    assert len(captured.read.slots) == (24 if protect else 0)  # rows that are only picked out have no inverse to fill
    for requests in (BATCHES["several"], BATCHES["one prompt"], BATCHES["middle chunk"], BATCHES["several"][::-1]):
        planned = both.run.schedule.prefill(requests, torch.device("cpu"))
        assert both.run.graphs.can_replay(planned)
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
@pytest.mark.parametrize("kept_high", ["self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "self_attn.qkv_proj"])
@pytest.mark.parametrize("protect", [False, True])
def test_the_last_layer_with_a_linear_in_bf16(kept_high: str, protect: bool) -> None:
    def change(layer: torch.nn.Module) -> None:
        layer.get_submodule(kept_high).quant_method.precision = dict.fromkeys(Role, "bf16")

    class Plain:
        def __init__(self, method: object) -> None:
            self._runtime = method._runtime  # type: ignore[attr-defined]

        def apply(self, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            return exact_linear(x, layer.weight)

    def stock(layer: torch.nn.Module) -> None:
        linear = layer.get_submodule(kept_high)
        linear.quant_method = Plain(linear.quant_method)

    for changed in (change, stock):
        both = pair("fp8", protect=protect, fused=True, change=changed)
        for requests in (BATCHES["several"], BATCHES["middle chunk"]):
            planned = both.run.schedule.prefill(requests, torch.device("cpu"))
            x = inputs(sum(r.new for r in requests))
            whole = forward(both.whole, *x, replace(planned.running, read=None))
            pruned = forward(both.pruned, *x, planned.running)
            kept = sampled(requests) if protect else last_rows(requests)
            assert torch.equal(pruned.normed[kept], whole.normed[kept])
            assert torch.equal(pruned.keys_and_values, whole.keys_and_values)
            assert bool(pruned.normed.isfinite().all())


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of each FP8 GEMM."""
    rows: list[int] = []

    def counted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(x))
        return exact_fp8(x, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(fp8_gemm, "CANDIDATES", {"exact": counted})
        yield rows


@ON_CPU
@pytest.mark.usefixtures("exact")
def test_how_many_rows_the_last_layer_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v, o, gate and up, down; the query of protected rows is BF16 alone."""
    several = BATCHES["several"]
    for protect, expected in ((False, [3, 12, 3, 3, 3]), (True, [12])):
        both = pair("fp8", protect=protect, fused=True)
        running = both.run.schedule.prefill(several, torch.device("cpu")).running
        with counting(monkeypatch) as rows:
            forward(both.pruned, *inputs(12), running)
        assert rows == expected


@ON_CPU
@pytest.mark.usefixtures("exact")
def test_whoever_reads_the_rows_left_out_gets_an_error() -> None:
    from mixquant_sglang.layers.outputs import ReadRows

    both = pair("nvfp4-emulated", protect=False, fused=True)
    running = both.run.schedule.prefill(BATCHES["several"], torch.device("cpu")).running
    layer = both.pruned.model.layers[-1]
    x, residual = inputs(12)
    with scope(running):
        y, residual = layer.post_attention_layernorm(x, residual)
        assert isinstance(y, ReadRows) and y.shape == x.shape
        with pytest.raises(TypeError, match=r"linear got the last layer's rows .* set 'prefill: {fuse: false}'"):
            F.linear(y, layer.mlp.gate_up_proj.weight)
        with pytest.raises(TypeError):
            y + residual


@pytest.mark.gpu
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_a_captured_graph_of_the_last_layer(name: str, protect: bool) -> None:
    from mixquant_sglang.layers.fused import fuse

    layer = block(name, "cuda", protect_last_prompt_token=protect)
    fuse(layer)
    replays_equal_the_whole_layer(causal_lm(layer, "cuda"), forward, protect)


def replays_equal_the_whole_layer(model: Any, forward: Callable[..., Results], protect: bool) -> None:
    """Of its last layer, run eagerly: a GEMM of fewer rows may round another way."""
    from mixquant_sglang.layers.last_layer import prune_last_layer

    run = model.model.layers[-1].mlp.down_proj.quant_method._runtime
    device = torch.device("cuda")
    x, residual = (torch.zeros(24, HIDDEN, dtype=torch.bfloat16, device=device) for _ in range(2))
    expected = []
    for requests in BATCHES.values():
        tokens = sum(r.new for r in requests)
        planned = run.schedule.prefill(requests, device)
        for static, part in zip((x, residual), inputs(tokens), strict=True):
            static[:tokens] = part.to(device)
        expected.append(forward(model, x[:tokens], residual[:tokens], planned.running))
    assert prune_last_layer(model)
    run.schedule.prunes = True
    captured = run.graphs.captured_pass(24, 64, device)
    forward(model, x, residual, captured)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(model, x, residual, captured)
    for requests, whole in zip(BATCHES.values(), expected, strict=True):
        tokens = sum(r.new for r in requests)
        planned = run.schedule.prefill(requests, device)
        for static, part in zip((x, residual), inputs(tokens), strict=True):
            static.fill_(7)
            static[:tokens] = part.to(device)
        kept = sampled(requests) if protect else last_rows(requests)
        results = [forward(model, x[:tokens], residual[:tokens], planned.running)]
        if run.graphs.can_replay(planned):
            run.graphs.load(planned)
            out.normed.fill_(torch.nan)
            graph.replay()
            assert bool(out.normed.isfinite().all())
            results.append(out)
        for result in results:
            for got, want in (
                (result.normed[kept], whole.normed[kept]),
                (result.keys_and_values[:tokens], whole.keys_and_values),
            ):
                if len(got):
                    assert (got.double() - want.double()).norm() / want.double().norm() < 2**-6


def test_what_is_not_pruned() -> None:
    from mixquant_sglang.layers.last_layer import prune_last_layer

    layer = block("nvfp4-emulated", "cpu")
    model = causal_lm(layer)
    model.capture_aux_hidden_states = True
    assert not prune_last_layer(model)
    assert not prune_last_layer(torch.nn.Sequential(layer))
    for linear in (layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
        linear.quant_method.precision = dict.fromkeys(Role, "bf16")
    assert not prune_last_layer(causal_lm(layer))
