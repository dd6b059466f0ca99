"""NVFP4 experts for SM100 on a CPU: SGLang's own layout and call, with stand-ins for FlashInfer's kernels."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.formats import nvfp4
from mixquant_sglang.kernels.experts.base import Form, Masters, Ready
from mixquant_sglang.kernels.experts.emulated import EmulatedNVFP4Experts
from mixquant_sglang.kernels.experts.native_nvfp4 import NativeNVFP4Experts
from mixquant_sglang.kernels.registry import refusal
from mixquant_sglang.kernels.tuning import fp4_experts
from mixquant_sglang.kernels.verify_experts import TOLERANCE, ExpertsPair, on_both_grids, routes, verify_experts
from mixquant_sglang.recipe.roles import Kind
from mixquant_sglang.versions.fp4_experts import TrtllmFP4Experts
from tests.support import blackwell
from tests.support.experts import OAI, dequantised, error, masters, reference, routed

SIZES = ((64, 128), (128, 256), (176, 128))  # I, H
PLAIN = Form()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    blackwell.CALLS.clear()
    blackwell.install_experts(monkeypatch.setattr)


def native(of: Masters, form: Form = PLAIN, **more: object) -> NativeNVFP4Experts:
    from mixquant_sglang.kernels.environment import Environment

    return NativeNVFP4Experts(of, form, environment=Environment(fp4_experts=TrtllmFP4Experts()), **more)  # type: ignore[arg-type]


def sglangs(of: Masters) -> dict[str, torch.Tensor]:
    """What SGLang's method for NVFP4 checkpoints makes of the same codes and scales, as its loaders place them."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.quantization import modelopt_quant

    experts, i = of.w2.shape[0], of.w2.shape[2]
    packed = [nvfp4.quantize(w, scales="search") for w in of.w13], [nvfp4.quantize(w, scales="search") for w in of.w2]
    method = modelopt_quant.ModelOptNvFp4FusedMoEMethod.__new__(modelopt_quant.ModelOptNvFp4FusedMoEMethod)
    method.quant_config = SimpleNamespace(use_per_token_activation=True, group_size=16)
    method.enable_flashinfer_trtllm_moe = method.use_flashinfer_trtllm_weight_layout = True
    method.moe_runner_config = MoeRunnerConfig()
    loader = inspect.getsource(FusedMoE)  # 0.5.17 swaps the halves in FusedMoE itself
    assert method.load_up_proj_weight_first or 'shard_id = {"w1": "w3", "w3": "w1", "w2": "w2"}[shard_id]' in loader
    layer = torch.nn.Module()
    up_first = [torch.cat((p.packed[i:], p.packed[:i])) for p in packed[0]]
    scales = [
        torch.cat((p.block_scales.view(torch.uint8)[i:], p.block_scales.view(torch.uint8)[:i])) for p in packed[0]
    ]
    for name, value in (
        ("w13_weight", torch.stack(up_first)),
        ("w13_weight_scale", torch.stack(scales).view(torch.float8_e4m3fn)),
        ("w13_weight_scale_2", torch.stack([p.tensor_scale for p in packed[0]])[:, None].expand(-1, 2).contiguous()),
        ("w13_input_scale", torch.full((experts, 2), 0.5)),
        ("w2_weight", torch.stack([p.packed for p in packed[1]])),
        ("w2_weight_scale", torch.stack([p.block_scales for p in packed[1]])),
        ("w2_weight_scale_2", torch.stack([p.tensor_scale for p in packed[1]])),
        ("w2_input_scale", torch.full((experts,), 0.25)),
    ):
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
    layer.moe_runner_config = MoeRunnerConfig()  # type: ignore[assignment]
    layer.dispatcher = SimpleNamespace(set_quant_config=lambda _: None)  # type: ignore[assignment]
    method.process_weights_after_loading(layer)
    names = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale", "g1_scale_c", "g1_alphas", "g2_alphas")
    return {name: getattr(layer, name).data for name in names}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    bytes_of = [t.reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*bytes_of)


def test_the_bytes_are_where_sglangs_own_method_puts_them() -> None:
    of = masters(3, 128, 256)
    for ours, (name, theirs) in zip(native(of).tensors(), sglangs(of).items(), strict=False):
        assert same_bytes(ours, theirs), name


@pytest.mark.parametrize(("i", "h"), SIZES)
def test_each_code_and_scale_by_its_place(i: int, h: int) -> None:
    """Read back as the kernels read, padding included: gate and up each to 128 rows."""
    of, padded = masters(3, i, h), -(-i // 128) * 128
    w13, scales13, w2, scales2, up, gate, down, one = native(of).tensors()
    for e in range(3):
        expected = nvfp4.quantize(of.w13[e], scales="search")
        codes, scales = blackwell.plain_rows(w13[e], scales13[e], gated=True)
        for half, rows in ((0, slice(i, None)), (1, slice(0, i))):
            at = half * padded
            assert torch.equal(codes[at : at + i], expected.packed[rows])
            assert same_bytes(scales[at : at + i], expected.block_scales[rows])
            assert not codes[at + i : at + padded].any() and not scales[at + i : at + padded].float().any()
        assert float(up[e]) == float(gate[e]) == float(expected.tensor_scale)
        expected = nvfp4.quantize(of.w2[e], scales="search")
        codes, scales = blackwell.plain_rows(w2[e], scales2[e], gated=False)
        assert same_bytes(codes, F.pad(expected.packed, (0, (padded - i) // 2)))
        assert same_bytes(scales[:, : i // 16].contiguous(), expected.block_scales)
        assert not scales[:, i // 16 :].float().any() and float(down[e]) == float(expected.tensor_scale)
    assert float(one) == 1


@pytest.mark.parametrize("form", [Form(), Form("gelu"), Form(scaling=2.5)], ids=["silu", "gelu", "scaling"])
@pytest.mark.parametrize(("i", "h"), SIZES)
def test_the_numbers_are_those_of_its_weights(i: int, h: int, form: Form) -> None:
    of, (x, weights, ids) = masters(5, i, h), routed(9, 5, h, 2)
    x = on_both_grids(9, h)
    ids[2], ids[3, 0] = -1, -1
    got, kept = native(of, form).run(x, weights, ids), x.clone()
    assert got.dtype == torch.bfloat16 and got.shape == x.shape and torch.equal(x, kept) and not got[2].any()
    low = error(got, reference(x, weights, ids, dequantised(of, "nvfp4"), form))
    assert low < 0.16 and error(got, reference(x, weights, ids, of, form)) > low
    assert blackwell.CALLS == ["nvfp4_quantize", "routed_moe"]


def test_gate_and_up_with_scales_of_their_own() -> None:
    of = masters(4, 64, 128)
    of.w13[:, 64:] *= 16
    made = [
        Ready([nvfp4.quantize(half) for half in w13.split([64, 64])], nvfp4.quantize(w2))
        for w13, w2 in zip(of.w13, of.w2, strict=True)
    ]
    packed, emulated = native(of, ready=made.__getitem__), EmulatedNVFP4Experts(of, Form(), ready=made.__getitem__)
    (weights, ids), x = routes(33, 4, 2), on_both_grids(33, 128)
    assert error(packed.run(x, weights, ids), emulated.run(x, weights, ids).double()) < TOLERANCE
    before, expected = [t.data_ptr() for t in packed.tensors()], packed.run(x, weights, ids)
    for tensor in packed.tensors():
        tensor.zero_()
    packed.replace(made.__getitem__)
    assert [t.data_ptr() for t in packed.tensors()] == before
    assert torch.equal(packed.run(x, weights, ids), expected)


def test_rows_are_independent() -> None:
    of, (x, weights, ids) = masters(4, 64, 128), routed(7, 4, 128, 2)
    packed = native(of)
    whole = packed.run(x, weights, ids)
    x[3] *= 1e4
    ids[3] = torch.tensor([2, 3])
    changed, others = packed.run(x, weights, ids), [0, 1, 2, 4, 5, 6]
    assert torch.equal(whole[others], changed[others]) and not torch.equal(whole[3], changed[3])
    assert torch.equal(packed.run(x[5:].clone(), weights[5:], ids[5:].contiguous()), changed[5:])
    assert packed.run(x[:0], weights[:0], ids[:0]).shape == (0, 128)


def test_fewer_experts_than_a_token_has() -> None:
    """Expert parallelism: this rank has 2, a token 4."""
    of, (weights, ids) = masters(2, 64, 128), routes(8, 2, 4)
    assert (ids[:, 2:] == -1).all()
    x = on_both_grids(8, 128)
    expected = reference(x, weights, ids, dequantised(of, "nvfp4"), Form())
    assert error(native(of).run(x, weights, ids), expected) < 0.16


def test_refresh_is_packing_anew_in_place() -> None:
    of, other = masters(3, 64, 128), masters(3, 64, 128, seed=5)
    packed = native(of)
    before = [t.data_ptr() for t in packed.tensors()]
    packed.refresh(other)
    assert [t.data_ptr() for t in packed.tensors()] == before
    assert all(same_bytes(a, b) for a, b in zip(packed.tensors(), native(other).tensors(), strict=True))
    assert packed.nbytes == sum(t.nbytes for t in packed.tensors())
    assert packed.nbytes == 3 * (2 * 128 * 128 + 128 * 128) * 9 // 16 + 3 * 3 * 4 + 4
    broken = Masters(of.w13.clone(), of.w2)
    broken.w13[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        packed.refresh(broken)


def test_a_models_own_buffer_and_sum_are_left_alone() -> None:
    """DeepSeek names the experts' input as the buffer of their result; protected rows are still to be read from it."""
    from sglang.srt.layers.moe.moe_runner.base import moe_output_buffer_ctx
    from sglang.srt.layers.moe.moe_runner.flashinfer_trtllm import flashinfer_trtllm_deferred_finalize_context

    of, (x, weights, ids) = masters(4, 64, 128), routed(7, 4, 128, 2)
    packed, before = native(of), x.clone()
    expected = packed.run(x, weights, ids)
    with moe_output_buffer_ctx(x), flashinfer_trtllm_deferred_finalize_context():
        got = packed.run(x, weights, ids)
    assert torch.equal(x, before) and torch.equal(got, expected)


# Refused


def test_sizes_and_gpus() -> None:
    def refused(i: int, h: int, *capability: int) -> str | None:
        return refusal("nvfp4", "native", i, h, Kind.EXPERTS, capability or None)  # type: ignore[arg-type]

    assert refused(704, 2816, 10, 0) is None and refused(768, 2048, 10, 3) is None
    assert refused(768, 2880, 10, 0) == "experts of [768, 2880] are not a multiple of 16 and 128"
    assert refused(8, 128, 10, 0) == "experts of [8, 128] are not a multiple of 16 and 128"
    for capability in ((11, 0), (12, 0), (12, 1)):
        assert refused(768, 2048, *capability) == (
            "NVFP4 experts with a scale for each token run on SM100 and SM103 alone"
        )
        assert refusal("nvfp4", "emulated", 768, 2048, Kind.EXPERTS, capability) is None


def test_forms() -> None:
    assert NativeNVFP4Experts.refuses(Form("gelu", scaling=2.0), False) is None
    assert "activation swiglu_oai" in (NativeNVFP4Experts.refuses(OAI, False) or "")
    assert "no bias" in (NativeNVFP4Experts.refuses(Form(), True) or "")
    assert "their input" in (NativeNVFP4Experts.refuses(Form(weighted_input=True), False) or "")
    assert EmulatedNVFP4Experts.refuses(OAI, True) is None


def test_nothing_is_packed_without_sglangs_experts() -> None:
    with pytest.raises(MixQuantError, match="SGLang's FP4 experts, which were not provided"):
        NativeNVFP4Experts(masters(2, 64, 128), Form())


# The check at load


def pair(form: Form = PLAIN, i: int = 64, h: int = 256, experts: int = 8) -> ExpertsPair:
    of = masters(experts, i, h)
    return ExpertsPair(
        "model.layers.0.mlp.experts", (experts, i, h, 2), native(of, form), EmulatedNVFP4Experts(of, form)
    )


def test_the_activations_are_on_both_grids() -> None:
    x = on_both_grids(257, 256)
    assert torch.equal(nvfp4.quantize_activations(x).dequantize(), x)
    codes, scales, rows = blackwell.by_token(x, 1 / (448 * 6))
    assert torch.equal(rows, nvfp4.row_scales(x))
    assert torch.equal(nvfp4.NVFP4Activations(codes, scales, rows).dequantize(), x)


def test_routes_are_of_all_experts() -> None:
    weights, ids = routes(16, 8, 2)
    assert {*ids.flatten().tolist()} == set(range(8)) and all(len({*row}) == 2 for row in ids.tolist())
    assert torch.allclose(weights.sum(-1), torch.ones(16))


@pytest.mark.parametrize("form", [Form(), Form("gelu", scaling=2.5)], ids=["silu", "gelu"])
def test_kernels_that_agree(form: Form) -> None:
    count, worst = verify_experts([pair(form), pair(form, 128, 128, 4)], CPU)
    assert count == 2 and 0.03 < worst < 0.8 * TOLERANCE


def flat(scales: torch.Tensor) -> torch.Tensor:
    return scales.view(torch.uint8).roll(4, dims=-1).view(scales.dtype)


WRONG = {
    "nibbles": lambda a: {"gemm1_weights": (a["gemm1_weights"] << 4) | (a["gemm1_weights"] >> 4)},
    "scales of other blocks": lambda a: {"gemm2_weights_scale": flat(a["gemm2_weights_scale"])},
    "scales of x": lambda a: {"hidden_states_scale": flat(a["hidden_states_scale"])},
    "rows of w2": lambda a: {"gemm2_weights": a["gemm2_weights"].roll(1, dims=1)},
    "gate and up": lambda a: {
        name: torch.cat((a[name][:, 1:], a[name][:, :1]), dim=1) for name in ("gemm1_weights", "gemm1_weights_scale")
    },
    "a tensor scale": lambda a: {"output2_scale_scalar": a["output2_scale_scalar"] * 1.05},
    "gate's tensor scale": lambda a: {"output1_scale_gate_scalar": a["output1_scale_gate_scalar"] * 1.5},
    "scales of tokens": lambda a: {"per_token_scale": a["per_token_scale"] * 2},
    "experts": lambda a: {"output1_scale_scalar": a["output1_scale_scalar"].roll(1) * 1.5},
    "nothing written": None,
}


@pytest.mark.parametrize("wrong", WRONG, ids=WRONG)
def test_kernels_that_disagree(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    import flashinfer.fused_moe

    change, made = WRONG[wrong], pair()

    def changed(**arguments: object) -> list[torch.Tensor]:
        if change is None:
            return [torch.full_like(arguments["output"], torch.nan)]  # type: ignore[call-overload]
        return blackwell.routed_moe(**{**arguments, **change(arguments)})  # type: ignore[arg-type]

    monkeypatch.setattr(flashinfer.fused_moe, "trtllm_fp4_block_scale_routed_moe", changed)
    with pytest.raises(
        MixQuantError, match=r"disagree on model\.layers\.0\.mlp\.experts, 8 experts of \[64, 256\] with"
    ):
        verify_experts([made], CPU)


def test_scaling_is_applied_once() -> None:
    of = masters(8, 64, 256)
    wrong = ExpertsPair("x", (8, 64, 256, 2), native(of, Form(scaling=2.5)), EmulatedNVFP4Experts(of, Form()))
    with pytest.raises(MixQuantError, match="disagree on x"):
        verify_experts([wrong], CPU)


# The experts that FlashInfer measures at start


def test_each_shape_is_measured_once_for_each_row_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[int, int]] = []
    monkeypatch.setattr(NativeNVFP4Experts, "run", lambda self, x, w, ids: ran.append((*x.shape,)))
    made = {(4, 64, 128, 2): native(masters(4, 64, 128)), (4, 64, 256, 2): native(masters(4, 64, 256))}
    said = fp4_experts.tune(made, 700, nullcontext())
    assert ran == [(m, h) for h in (128, 256) for m in (256, 512, 1024)]
    assert said.startswith("FlashInfer chose FP4 experts for 2 shapes and up to 1024 rows in ")


def test_other_forms_are_other_numbers() -> None:
    of, (x, weights, ids) = masters(4, 64, 128), routed(7, 4, 128, 2)
    first = native(of).run(x, weights, ids)
    assert not torch.equal(first, native(of, Form("gelu")).run(x, weights, ids))
