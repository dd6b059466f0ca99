"""The linear method against the installed SGLang: which rows take which precision, eagerly and in a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.rows import EagerRows, GraphRows
from mixquant_sglang.passes.rows import RequestRows, RowSplit, split_rows
from mixquant_sglang.passes.running import DECODE_PASS, Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device, select

machine = pytest.importorskip("mixquant_sglang.versions.machine")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
N, K = 96, 64


def eager(rows: RowSplit, device: torch.device) -> EagerRows:
    return EagerRows(rows.total, rows.protected, device)


def make(name: str, device: str, **changes: object) -> tuple[Runtime, torch.nn.Module, torch.Tensor]:
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    asked = replace(recipe.load(name), **changes)
    run = Runtime(asked, select(asked, Device("this CPU", None) if device == "cpu" else machine.device()))
    method = MixQuantLinearMethod(run, "model.layers.0.x", run.selection.prefill, run.selection.decode)
    layer = torch.nn.Module()
    method.create_weights(layer, K, [N], K, N, torch.bfloat16, weight_loader=None)
    torch.manual_seed(0)
    layer.weight.data = torch.randn(N, K, dtype=torch.bfloat16, device=device) * 0.05
    layer.quant_method = method
    method.process_weights_after_loading(layer)
    x = torch.randn(7, K, dtype=torch.bfloat16, device=device)
    return run, layer, x


def apply(layer: torch.nn.Module, x: torch.Tensor, running: Pass, bias: torch.Tensor | None = None) -> torch.Tensor:
    with scope(running):
        return layer.quant_method.apply(layer, x, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_decode_is_the_stock_linear_bit_for_bit(name: str, device: str) -> None:
    _, layer, x = make(name, device)
    bias = torch.randn(N, dtype=torch.bfloat16, device=device)
    assert torch.equal(apply(layer, x, DECODE_PASS, bias), F.linear(x, layer.weight, bias))
    assert torch.equal(layer.quant_method.apply(layer, x), F.linear(x, layer.weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "least", "most"), [("nvfp4-emulated", 0.05, 0.2), ("fp8", 0.01, 0.06)])
def test_prefill_is_low_precision(name: str, least: float, most: float, device: str) -> None:
    _, layer, x = make(name, device)
    low = apply(layer, x, Pass(Role.PROMPT)).float()
    high = F.linear(x, layer.weight).float()
    error = float((low - high).norm() / high.norm())
    assert least < error < most


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_protected_rows_are_bf16_and_the_others_are_not_touched(name: str, device: str) -> None:
    _, layer, x = make(name, device)
    rows = split_rows([RequestRows(3, 0, 3), RequestRows(3, 0, 90), RequestRows(1, 5, 4, True)], last_prompt_token=True)
    out = apply(layer, x, Pass(Role.PROMPT, eager(rows, x.device)))
    low = apply(layer, x, Pass(Role.PROMPT))
    protected = [2, 6]
    others = [0, 1, 3, 4, 5]
    assert torch.equal(out[protected], F.linear(x[protected], layer.weight))
    assert torch.equal(out[others], low[others])
    assert not torch.equal(out[protected], low[protected])


@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_rows_that_were_added_behind_a_pass_change_no_row_of_it(name: str) -> None:
    """As DP attention does, which gives a rank's linears rows of no request."""
    run, layer, x = make(name, "cpu")
    run.schedule.local = True
    scheduled = run.schedule.prefill([RequestRows(3, 0, 3), RequestRows(4, 0, 90)], x.device).running
    out = apply(layer, x, scheduled)
    more = torch.cat([x, 100 * torch.ones(2, K, dtype=x.dtype)])
    assert torch.equal(apply(layer, more, run.schedule.padded(scheduled, 9))[:7], out)
    assert torch.equal(out[2:3], F.linear(x[2:3], layer.weight))


@pytest.mark.parametrize("requests", [[RequestRows(7, 0, 7)], [RequestRows(7, 0, 90)]], ids=["protected", "none"])
def test_rows_of_other_ranks_end_a_pass(requests: list[RequestRows]) -> None:
    """A chunk without protected rows too, of which nothing else would tell that the linear sees more."""
    run, layer, x = make("fp8", "cpu")
    run.schedule.local = True
    scheduled = run.schedule.prefill(requests, x.device).running
    apply(layer, x, scheduled)
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.x got 14 rows in a pass of 7"):
        apply(layer, torch.cat([x, x]), scheduled)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_a_captured_graph_protects_the_rows_of_each_replay(name: str) -> None:
    _, layer, x = make(name, "cuda")
    graph_rows = GraphRows(4, 64, x.device)
    apply(layer, x, Pass(Role.PROMPT, graph_rows.of(len(x))))  # compile outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = apply(layer, x, Pass(Role.PROMPT, graph_rows.of(len(x))))
    low = apply(layer, x, Pass(Role.PROMPT))
    for ranges in ([], [(6, 7)], [(0, 1), (3, 5)], [(2, 6)], [(6, 7)]):
        out.fill_(torch.nan)
        graph_rows.fill(tuple(ranges))
        graph.replay()
        chosen = [i for start, stop in ranges for i in range(start, stop)]
        others = [i for i in range(len(x)) if i not in chosen]
        assert torch.equal(out[others], low[others])
        high = F.linear(x[chosen].double(), layer.weight.double())
        assert torch.allclose(out[chosen].double(), high, rtol=2**-7, atol=1e-3)
        assert not chosen or not torch.equal(out[chosen], low[chosen])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_a_row_does_not_depend_on_its_neighbours(name: str, device: str) -> None:
    _, layer, x = make(name, device)
    crowd = torch.cat([x, 1000 * torch.randn(33, K, dtype=x.dtype, device=x.device)])
    alone = apply(layer, x, Pass(Role.PROMPT)).double()
    together = apply(layer, crowd, Pass(Role.PROMPT))[: len(x)].double()
    # Equal codes and scales; what is left is the GEMM's own choice of summation order, below one BF16 step.
    assert torch.allclose(alone, together, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: str) -> None:
    for name in ("nvfp4-emulated", "fp8"):
        _, layer, x = make(name, device)
        assert apply(layer, x[:0], Pass(Role.PROMPT)).shape == (0, N)


def test_an_unexpected_number_of_rows_is_an_error() -> None:
    _, layer, x = make("nvfp4-emulated", "cpu")
    rows = eager(split_rows([RequestRows(9, 0, 9)], last_prompt_token=True), x.device)
    with pytest.raises(RuntimeError, match=r"model\.layers\.0\.x got 7 rows in a pass of 9"):
        apply(layer, x, Pass(Role.PROMPT, rows))


@pytest.mark.parametrize("name", ["nvfp4-emulated", "fp8"])
def test_refresh_keeps_addresses_and_packs_the_new_weights(name: str) -> None:
    run, layer, x = make(name, "cpu")
    packed = layer.quant_method._packed[run.selection.prefill]
    before = [t.data_ptr() for t in packed.tensors()]
    old = apply(layer, x, Pass(Role.PROMPT))
    layer.weight.data.mul_(0.5)
    run.weights.changed()
    assert run.weights.refresh() is None
    assert [t.data_ptr() for t in packed.tensors()] == before
    new = apply(layer, x, Pass(Role.PROMPT))
    assert torch.allclose(new.float(), 0.5 * old.float(), rtol=0.3, atol=0.05) and not torch.equal(new, old)


@pytest.mark.parametrize("asked", [False, True])
def test_weights_that_a_loader_wrote_without_asking_or_after_it_are_packed(asked: bool) -> None:
    """``--load-format remote_instance`` never calls ``process_weights_after_loading``, ``sharded_state`` too early."""
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    run, loaded, x = make("nvfp4-emulated", "cpu")
    run = Runtime(run.recipe, run.selection)
    method, layer = MixQuantLinearMethod(run, "model.layers.0.x", "nvfp4", "bf16"), torch.nn.Module()
    method.create_weights(layer, K, [N], K, N, torch.bfloat16, weight_loader=None)
    layer.quant_method = method
    layer.weight.data = torch.full((N, K), torch.nan, dtype=torch.bfloat16)  # what was in the memory before
    if asked:
        method.process_weights_after_loading(layer)
    layer.weight.data.copy_(loaded.weight.data)
    run.weights.finish_load()
    assert torch.equal(apply(layer, x, Pass(Role.PROMPT)), apply(loaded, x, Pass(Role.PROMPT)))


def test_what_cannot_be_packed_is_named() -> None:
    run, layer, _ = make("nvfp4-emulated", "cpu")
    layer.weight.data[3, 5] = torch.nan
    with pytest.raises(MixQuantError, match=r"cannot pack model\.layers\.0\.x: .* contains NaN or infinity"):
        run.weights.finish_load()


def test_shadows_are_not_part_of_the_model() -> None:
    _, layer, _ = make("nvfp4-emulated", "cpu")
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert not list(layer.named_buffers()) and not list(layer.children())


def test_a_shape_that_no_kernel_takes_stays_bf16() -> None:
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    asked = recipe.load("nvfp4-emulated")
    run = Runtime(asked, select(asked, machine.device()))
    method = MixQuantLinearMethod(run, "odd", "nvfp4", "bf16")
    layer = torch.nn.Module()
    method.create_weights(layer, 24, [8], 24, 8, torch.bfloat16, weight_loader=None)
    layer.weight.data = torch.randn(8, 24, dtype=torch.bfloat16)
    method.process_weights_after_loading(layer)
    assert method.refusal == "K = 24 is not a multiple of the block size 16" and method.extra_bytes == 0
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    with scope(Pass(Role.PROMPT)):
        assert torch.equal(method.apply(layer, x), F.linear(x, layer.weight))
