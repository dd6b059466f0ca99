"""Quantisation fused into SGLang's norms and activations: the linears' results stay, to the bit where torch does it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang import phase, recipe
from mixquant_sglang.kernels import select
from mixquant_sglang.kernels.activations import QuantizedActivations
from mixquant_sglang.phase import DECODE_PASS, Pass, Phase
from mixquant_sglang.rows import EagerRows, RequestRows, RowPlan, plan
from mixquant_sglang.runtime import Runtime

compat = pytest.importorskip("mixquant_sglang.compat")

# SGLang's norms take one kind of tensor for a process: CUDA's where there is a GPU.
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="SGLang's norms run on the GPU that is here")
DEVICES = [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, HIDDEN, WIDE = 9, 64, 160
ROWS = plan([RequestRows(4, 0, 4), RequestRows(4, 0, 90), RequestRows(1, 5, 4, True)], last_prompt_token=True)
PROTECTED, OTHERS = [3, 8], [0, 1, 2, 4, 5, 6, 7]


def eager(rows: RowPlan, device: torch.device) -> EagerRows:
    return EagerRows(rows.total, rows.protected, device)


class Linear(torch.nn.Module):
    def __init__(self, run: Runtime, name: str, n: int, k: int, device: str) -> None:
        from mixquant_sglang.method import MixQuantLinearMethod

        super().__init__()
        self.quant_method = MixQuantLinearMethod(run, name, run.selection.prefill, run.selection.decode)
        self.quant_method.create_weights(self, k, [n], k, n, torch.bfloat16, weight_loader=None)
        self.weight.data = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.05
        self.quant_method.process_weights_after_loading(self)

    def forward(self, x: torch.Tensor | QuantizedActivations) -> torch.Tensor:
        return self.quant_method.apply(self, x)


def block(name: str, device: str, **changes: object) -> torch.nn.Module:
    """The modules of a Qwen3 decoder layer that fusion looks at, of SGLang's own types, without attention."""
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.models.qwen2 import Qwen2MLP
    from sglang.srt.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer

    asked = replace(recipe.load(name), **changes)
    run = Runtime(asked, select(asked, compat.device()))
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
    for norm_name in ("input_layernorm", "post_attention_layernorm"):
        norm = RMSNorm(HIDDEN, eps=1e-6)
        norm.weight.data = (1 + 0.1 * torch.randn(HIDDEN)).to(torch.bfloat16).to(device)
        setattr(layer, norm_name, norm)
    layer.mlp = mlp
    return layer


def outputs(layer: torch.nn.Module, running: Pass, device: str) -> list[torch.Tensor]:
    """qkv of the first norm; then gate_up, down and the residual of the second."""
    torch.manual_seed(1)
    x, residual = (torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device) for _ in range(2))
    with phase.scope(running):
        qkv = layer.self_attn.qkv_proj(layer.input_layernorm(x.clone()))
        qkv = torch.cat(qkv.split([HIDDEN, HIDDEN // 2, HIDDEN // 2], dim=-1), dim=-1)
        y, residual = layer.post_attention_layernorm(x.clone(), residual)
        gate_up = layer.mlp.gate_up_proj(y)
        down = layer.mlp.down_proj(layer.mlp.act_fn(gate_up))
    return [qkv, gate_up, down, residual]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_fused_equals_unfused(name: str, device: str) -> None:
    from mixquant_sglang.fusion import fuse

    layer = block(name, device)
    passes = [Pass(Phase.PREFILL), Pass(Phase.PREFILL, eager(ROWS, torch.device(device))), DECODE_PASS]
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
    from mixquant_sglang.fusion import fuse

    layer = block(name, "cpu")
    fuse(layer)
    rows = eager(ROWS, torch.device("cpu"))
    fused = outputs(layer, Pass(Phase.PREFILL, rows), "cpu")
    high = outputs(layer, DECODE_PASS, "cpu")
    assert torch.equal(fused[0][PROTECTED], high[0][PROTECTED])
    assert torch.equal(fused[1][PROTECTED], high[1][PROTECTED])
    assert torch.equal(fused[2][PROTECTED], high[2][PROTECTED])


@ON_CPU
def test_whoever_reads_the_missing_matrix_gets_an_error() -> None:
    from mixquant_sglang.fusion import fuse

    layer = block("nvfp4-emulated", "cpu")
    fuse(layer)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    with phase.scope(Pass(Phase.PREFILL)):
        y = layer.input_layernorm(x)
        assert isinstance(y, QuantizedActivations) and y.shape == x.shape and not hasattr(y, "_sglang_some_flag")
        with pytest.raises(TypeError, match=r"linear got activations .* set 'prefill: {fuse: false}'"):
            F.linear(y, layer.self_attn.qkv_proj.weight)
        with pytest.raises(TypeError):
            y + x
        with pytest.raises(TypeError):
            x + y


def test_what_is_not_fused() -> None:
    from mixquant_sglang.fusion import fuse

    layer = block("nvfp4-emulated", "cpu")
    layer.input_layernorm.cast_x_before_out_mul = True
    layer.post_attention_layernorm.weight.data = layer.post_attention_layernorm.weight.data.float()
    layer.mlp.act_fn._forward_method = lambda x: x
    assert not fuse(layer)
    layer = block("nvfp4-emulated", "cpu")
    layer.mlp.down_proj.quant_method.precision = dict.fromkeys(Phase, "bf16")
    assert fuse(layer) == Counter(RMSNorm=2)
    assert not fuse(torch.nn.Sequential(block("nvfp4-emulated", "cpu").mlp.gate_up_proj))


@ON_CPU
def test_no_rows_and_additions_take_the_plain_norm() -> None:
    from mixquant_sglang.fusion import fuse

    layer = block("nvfp4-emulated", "cpu")
    fuse(layer)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    with phase.scope(Pass(Phase.PREFILL)):
        assert isinstance(layer.input_layernorm(x[:0]), torch.Tensor)
        y, _ = layer.input_layernorm(x, x.clone(), x.clone())
        assert isinstance(y, torch.Tensor)
        gaps = torch.randn(TOKENS, 2 * HIDDEN, dtype=torch.bfloat16)[:, :HIDDEN]
        assert isinstance(layer.input_layernorm(gaps), torch.Tensor)
        y, _ = layer.input_layernorm(x.clone(), gaps)
        assert isinstance(y, torch.Tensor)
        wrong = eager(plan([RequestRows(5, 0, 5)], last_prompt_token=True), x.device)
        with phase.scope(Pass(Phase.PREFILL, wrong)), pytest.raises(RuntimeError, match="qkv_proj got 9 rows"):
            layer.input_layernorm(x)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nvfp4-emulated", pytest.param("fp8", marks=pytest.mark.gpu)])
def test_the_last_layer_computes_the_rows_that_are_read(name: str, device: str, protect: bool, fused: bool) -> None:
    """Decode rows and last rows as without pruning (a GEMM of fewer rows may round another way), zeros elsewhere."""
    from mixquant_sglang.fusion import fuse, prune_last_layer

    if (name, device) == ("fp8", "cpu"):
        pytest.skip("FP8 on the CPU quantises activations itself, and is not pruned; a GPU is needed")
    layer = block(name, device)
    if fused:
        fuse(layer)
    rows = eager(ROWS, torch.device(device))
    read = rows if protect else EagerRows(ROWS.total, ROWS.last, torch.device(device))
    wanted = PROTECTED if protect else [3, 7, 8]
    torch.manual_seed(2)
    attention = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)

    def run(running: Pass) -> tuple[torch.Tensor, ...]:
        with phase.scope(running):
            o = layer.self_attn.o_proj(attention)
            y, residual = layer.post_attention_layernorm(o.clone(), torch.ones_like(o))
            return o, residual, layer.mlp.down_proj(layer.mlp.act_fn(layer.mlp.gate_up_proj(y)))

    whole = run(Pass(Phase.PREFILL, rows if protect else None))
    assert prune_last_layer(causal_lm(layer))
    again = run(Pass(Phase.PREFILL, rows if protect else None))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))  # where all rows are read
    pruned = run(Pass(Phase.PREFILL, rows if protect else None, read))
    for before, after in zip(whole, pruned, strict=True):
        assert bool(after.isfinite().all())
        error = (before[wanted].double() - after[wanted].double()).norm() / before[wanted].double().norm()
        assert error < 2**-7
    unread = [i for i in range(TOKENS) if i not in wanted]
    assert not pruned[0][unread].any() and not pruned[2][unread].any() and bool((pruned[1][unread] == 1).all())
    nothing = run(Pass(Phase.PREFILL, None, EagerRows(TOKENS, (), torch.device(device))))
    assert not nothing[0].any() and not nothing[2].any()


def causal_lm(layer: torch.nn.Module) -> torch.nn.Module:
    from sglang.srt.models.qwen3 import Qwen3ForCausalLM

    model = Qwen3ForCausalLM.__new__(Qwen3ForCausalLM)
    torch.nn.Module.__init__(model)
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity(), layer])
    return model


def test_what_is_not_pruned() -> None:
    from mixquant_sglang.fusion import prune_last_layer

    layer = block("nvfp4-emulated", "cpu")
    model = causal_lm(layer)
    model.capture_aux_hidden_states = True
    assert not prune_last_layer(model)
    assert not prune_last_layer(torch.nn.Sequential(layer))
    for linear in (layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
        linear.quant_method.precision = dict.fromkeys(Phase, "bf16")
    assert not prune_last_layer(causal_lm(layer))
