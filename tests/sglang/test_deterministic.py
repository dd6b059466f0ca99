"""Deterministic inference in low precision: a row's precision and its products do not depend on who is beside it."""

from __future__ import annotations

import logging
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import deterministic, gathering, lifecycle, min_tokens, norm_rope, tuning
from mixquant_sglang.host.around_attention import prepare_around_attention
from mixquant_sglang.host.hooks import launcher
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.environment import Environment
from mixquant_sglang.kernels.rows import EagerRows
from mixquant_sglang.layers import bypasses
from mixquant_sglang.layers.linear import MixQuantLinearMethod
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import DECODE_PASS, PROTECTED_PASS, Pass, scope
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.versions import machine

CPU = torch.device("cpu")
HOPPER = Device("an H200", (9, 0))
N, K = 96, 64


def runtime(name: str = "fp8", device: Device | None = None, *, invariant: bool = True, **changes: Any) -> Runtime:
    asked = recipe.load(name)
    for field, value in changes.items():
        object.__setattr__(asked, field, value)
    return Runtime(
        asked, select(asked, device or Device("this CPU", None)), environment=Environment(invariant=invariant)
    )


def linear(run: Runtime, name: str = "a.linear", n: int = N, bias: bool = False) -> torch.nn.Module:
    method = MixQuantLinearMethod(run, name, run.selection.prefill, run.selection.decode)
    layer = torch.nn.Module()
    method.create_weights(layer, K, [n], K, n, torch.bfloat16, weight_loader=None)
    torch.manual_seed(n)
    layer.weight.data = torch.randn(n, K, dtype=torch.bfloat16) * 0.05
    layer.bias = torch.nn.Parameter(torch.randn(n).bfloat16(), requires_grad=False) if bias else None
    layer.quant_method = method
    method.process_weights_after_loading(layer)
    return layer


# -- which rows are low ------------------------------------------------------------------------------------------------


def rows_of(prompt: int, bf16: bool, rng: random.Random) -> list[RequestRows]:
    """The chunks of a request, cut at random."""
    cuts = sorted({0, prompt, *(rng.randrange(1, prompt) for _ in range(rng.randrange(3)) if prompt > 1)})
    return [RequestRows(b - a, a, prompt, bf16=bf16) for a, b in pairwise(cuts)]


def precisions(run: Runtime, requests: list[RequestRows]) -> dict[tuple[int, int], bool]:
    """Of each prefilled row, by request and position: whether its products are low, as linears read the pass."""
    scheduled = run.schedule.prefill(requests, CPU)
    running, row, found = scheduled.running, 0, {}
    high = set(running.rows.index.tolist()) if isinstance(running.rows, EagerRows) else set()
    for number, request in enumerate(requests):
        for position in range(request.prefix, request.prefix + request.new):
            found[number, position] = running.role is Role.PROMPT and row not in high
            row += 1
    low = sum(found.values())
    assert scheduled.tokens.get(("prefill", "fp8"), 0) == low, "counted as it ran"
    assert sum(scheduled.tokens.values()) == len(found)
    return found


@pytest.mark.parametrize("least", [None, 40])
def test_a_row_is_low_by_its_request_alone(least: int | None) -> None:
    run, rng = runtime(min_tokens=least), random.Random(0)
    seen: dict[tuple[int, bool, int], bool] = {}
    for _ in range(400):
        parts = [
            rng.choice(rows_of(prompt, rng.random() < 0.2, rng))
            for prompt in (rng.choice([1, 7, 39, 40, 41, 100]) for _ in range(rng.randrange(1, 5)))
        ]
        for (number, position), low in precisions(run, parts).items():
            request = parts[number]
            key = request.prompt, request.bf16, position
            assert seen.setdefault(key, low) == low, key
            wanted = not request.bf16 and position < request.prompt - 1 and request.prompt >= (least or 1)
            assert low == wanted, key
    assert len(seen) > 300


def test_without_it_min_tokens_speaks_of_a_pass() -> None:
    alone, whole = [RequestRows(30, 0, 30)], [RequestRows(30, 0, 30), RequestRows(30, 0, 30)]
    run = runtime(invariant=False, min_tokens=40)
    assert not precisions(run, alone)[0, 3] and precisions(run, whole)[0, 3]
    run = runtime(min_tokens=40)
    assert not precisions(run, alone)[0, 3] and not precisions(run, whole)[0, 3]


def test_short_prompts_are_counted_as_such() -> None:
    run = runtime(min_tokens=40)
    short, long = RequestRows(30, 0, 30), RequestRows(30, 0, 60)
    for requests in ([short], [short, short], [short, long], [long]):
        run.count_prefill(run.schedule.prefill(requests, CPU))
    state = run.state()
    assert state["below_min_tokens"] == {"passes": 2, "rows": 90}
    assert state["tokens"]["prefill"] == {"bf16": 120, "fp8": 60}
    assert state["deterministic"] is True and "deterministic" not in runtime(invariant=False).state()


def test_what_is_timed_is_not_chosen_by(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = runtime("fp8", HOPPER)
    min_tokens.choose(run, SimpleNamespace(), [], [], torch.device("cuda"))
    assert run.schedule.min_tokens == 1 and "min_tokens: auto is 1: what is timed may come out" in caplog.text


def test_its_numbers_have_a_name_of_their_own() -> None:
    assert runtime().fingerprint != runtime(invariant=False).fingerprint
    assert runtime("bf16").fingerprint == runtime("bf16", invariant=False).fingerprint == "bf16"


# -- how they are multiplied -------------------------------------------------------------------------------------------


def test_protected_rows_are_sglangs_own_product() -> None:
    """Never the kernel of few rows, whatever their number and wherever they are kept."""
    layer, plain = linear(runtime()), linear(runtime(invariant=False))
    x = torch.randn(7, K).bfloat16()
    rows = EagerRows(7, ((2, 3), (6, 7)), CPU)
    gpu = SimpleNamespace(is_cuda=True, shape=(2, K))
    assert plain.quant_method.takes_few(gpu, rows) and not layer.quant_method.takes_few(gpu, rows)
    with scope(Pass(Role.PROMPT, rows)):
        beside = layer.quant_method.apply(layer, x)
    with scope(PROTECTED_PASS):
        alone = layer.quant_method.apply(layer, x[[2, 6]])
    assert torch.equal(beside[[2, 6]], alone)
    assert not torch.equal(beside, F.linear(x, layer.weight))


@pytest.mark.parametrize("invariant", [False, True])
def test_a_prefill_pass_in_bf16_takes_no_other_product(invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's products past ``apply`` are for some numbers of rows alone; decode keeps them."""
    layer = linear(runtime(invariant=invariant))
    x, out = torch.randn(3, K).bfloat16(), torch.empty(3, N, dtype=torch.bfloat16)
    ran: list[str] = []

    def into(method: Any, layer: Any, x: Any, output: torch.Tensor, bias: Any = None) -> torch.Tensor:
        ran.append("into")
        return output

    monkeypatch.setattr(MixQuantLinearMethod.__mro__[2], "apply_into", into, raising=False)
    for running, left in ((DECODE_PASS, True), (PROTECTED_PASS, not invariant), (Pass(Role.PROMPT), False)):
        ran.clear()
        with scope(running):
            assert bypasses.left_to_sglang(layer, x) == left
            got = layer.quant_method.apply_into(layer, x, out)
        assert got is out and ran == ["into"] * left
    with scope(PROTECTED_PASS):
        layer.quant_method.apply_into(layer, x, out)
    assert invariant == torch.equal(out, F.linear(x, layer.weight))


class Depends:
    """A product that depends on the number of rows, as cuBLAS's does, in one role."""

    def __init__(self, method: Any, role: Role) -> None:
        self._product, self._role = method.product, role

    def __call__(self, role: Role, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        out = self._product(role, layer, x, bias)
        return out * 1.0078125 if role is self._role and len(x) < 16 else out


def exact(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Products row by row, whose bits do not depend on the number of rows on a CPU either; what was multiplied."""
    seen: list[tuple[int, ...]] = []

    def product(method: Any, role: Role, layer: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        seen.append(tuple(x.shape))
        rows = (x[:, None].double() * layer.weight.double()).sum(-1).bfloat16()
        return rows if bias is None else rows + bias

    monkeypatch.setattr(MixQuantLinearMethod, "product", product)
    return seen


def test_a_start_shows_that_rows_keep_their_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seen, run = exact(monkeypatch), runtime()
    layers = [linear(run, f"layers.{i}", n, bias) for i, (n, bias) in enumerate([(96, False), (96, False), (48, True)])]
    deterministic.prove_rows(run, run.layers)
    assert seen == [(257, K), (1, K), (3, K), (64, K)] * 4  # two kinds, two roles
    assert "the same bits alone and beside 256, in 2 kinds of linear" in caplog.text
    for role, words in (
        (Role.PROMPT, r"in fp8 beside 256 .*: its GEMM here"),
        (Role.PROTECTED, "in bf16 .*SGLang's own"),
    ):
        method = layers[2].quant_method
        monkeypatch.setattr(method, "product", Depends(method, role), raising=False)
        with pytest.raises(MixQuantError, match=rf"layers\.2 gives a row other bits {words}"):
            deterministic.prove_rows(run, run.layers)
        monkeypatch.delattr(method, "product")
    seen.clear()
    deterministic.prove_rows(runtime(invariant=False), run.layers)
    assert not seen


# -- what a start does -------------------------------------------------------------------------------------------------


def runner(**args: Any) -> Any:
    return SimpleNamespace(
        model=torch.nn.Module(), server_args=SimpleNamespace(**args), is_generation=True, device="cuda"
    )


def test_experts_stay_bf16(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kept: list[str] = []
    experts = [SimpleNamespace(low={"fp8"}, stay_bf16=kept.append), SimpleNamespace(low=set(), stay_bf16=kept.append)]
    monkeypatch.setattr(deterministic.report, "experts", lambda model: [("a", experts[0]), ("b", experts[1])])
    deterministic.keep_rows_apart(runtime(), runner(enable_deterministic_inference=True))
    assert kept == [deterministic.EXPERTS] and "one GEMM for every number of low rows" in caplog.text
    deterministic.keep_rows_apart(runtime(invariant=False), runner(enable_deterministic_inference=False))
    assert len(kept) == 1


@pytest.mark.parametrize("asked", [False, True])
def test_a_process_that_was_told_another_thing_ends(asked: bool) -> None:
    with pytest.raises(MixQuantError, match=f"SGLang has --enable-deterministic-inference {asked}, where"):
        deterministic.keep_rows_apart(runtime(invariant=not asked), runner(enable_deterministic_inference=asked))
    deterministic.keep_rows_apart(runtime("bf16", invariant=not asked), runner(enable_deterministic_inference=asked))


@pytest.mark.parametrize("invariant", [False, True])
def test_nothing_is_fused_tuned_or_gathered(invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, called = runtime("fp8", HOPPER, invariant=invariant), []

    def calls(name: str, result: Any = None) -> Any:
        return lambda *_: (called.append(name), result)[1]

    monkeypatch.setattr(lifecycle.fused, "fuse", calls("fuse", {}))
    monkeypatch.setattr(lifecycle.last_layer, "prune_last_layer", calls("prune", False))
    monkeypatch.setattr(lifecycle.refusals, "watching", lambda args: [])
    monkeypatch.setattr(lifecycle.speculation, "draft_reads_hidden_states", lambda runner: False)
    monkeypatch.setattr(tuning, "prefill_rows", lambda runner: [256])
    monkeypatch.setattr(tuning.machine, "kernel_versions", dict)
    monkeypatch.setattr(tuning.fp8_cache, "load_or_tune", calls("tune", tuning.fp8_gemm.GemmTable({})))
    monkeypatch.setattr(tuning.fp8_gemm, "use", lambda table: None)
    monkeypatch.setattr(gathering, "gathers", lambda args: False)
    monkeypatch.setattr(gathering, "prefill_attention", lambda args: "fa3")
    monkeypatch.setattr(gathering, "caches_bf16", lambda args: True)
    monkeypatch.setattr(gathering, "heads_of", calls("gather"))
    monkeypatch.setattr(norm_rope, "find", calls("norm and RoPE", ({}, {})))
    steps = lifecycle.LoadSteps(run, SimpleNamespace(ready=None))  # type: ignore[arg-type]
    steps._fuse(runner())
    method = SimpleNamespace(runs=lambda *kernel: kernel == ("fp8", "native"), gemm_shapes=[(96, 64)])
    tuning.tune_fp8(run, runner(), [method], torch.device("cuda"))  # type: ignore[list-item]
    prepare_around_attention(run, runner(), torch.device("cuda"))
    assert called == ([] if invariant else ["fuse", "prune", "tune", "norm and RoPE", "gather"])


def test_schedulers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DETERMINISTIC_ENV, "0")
    launcher._tell_deterministic(SimpleNamespace(enable_deterministic_inference=False))
    assert not machine.deterministic()
    launcher._tell_deterministic(SimpleNamespace(enable_deterministic_inference=True))
    assert machine.deterministic()
