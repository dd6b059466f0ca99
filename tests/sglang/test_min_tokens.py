"""``min_tokens: auto`` at load: what is timed of a model's layers, what all ranks make of it, where it is 1."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixquant_sglang import recipe
from mixquant_sglang.host import min_tokens
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.tuning import break_even
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import current
from mixquant_sglang.recipe.roles import Role
from mixquant_sglang.recipe.select import Device, Selection, select
from mixquant_sglang.versions import graphs

pytest.importorskip("mixquant_sglang.versions.machine")

CUDA = torch.device("cuda")
HOPPER = Device("an H200", (9, 0))
K = 64


def runtime(name: str, device: Device, **changes: Any) -> Runtime:
    asked = replace(recipe.load(name), **changes)
    return Runtime(asked, select(asked, device))


def linears(run: Runtime, sizes: list[int], device: str = "cpu", k: int = K) -> list[Any]:
    from mixquant_sglang.layers.linear import MixQuantLinearMethod

    made = []
    torch.manual_seed(0)
    for place, n in enumerate(sizes):
        method = MixQuantLinearMethod(run, f"layers.{place}", run.selection.prefill, run.selection.decode)
        layer = torch.nn.Module()
        method.create_weights(layer, k, [n], k, n, torch.bfloat16, weight_loader=None)
        layer.weight.data = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.05
        layer.quant_method = method
        method.process_weights_after_loading(layer)
        made.append(method)
    return made


def test_layers_that_are_alike_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the passes that a server runs: whole in BF16, and low with the last row protected."""
    from mixquant_sglang.layers.pass_times import kinds_of

    methods = linears(runtime("fp8", Device("this CPU", None)), [96, 48, *[96] * 5])
    kinds = kinds_of(torch.nn.Module(), methods, [], protects=True)
    assert [*kinds] == [("linear", "fp8")]
    wide, narrow = kinds["linear", "fp8"]
    assert (wide.words, wide.count, wide.each) == ("6 linears [96, 64]", 6, 4)
    assert (wide.sizes, narrow.sizes) == ((96, K, 96, 2), (48, K, 48, 2))
    assert kinds_of(torch.nn.Module(), methods, [], protects=False)["linear", "fp8"][0].sizes == (96, K, 96, 1)
    monkeypatch.setattr("mixquant_sglang.kernels.rows.CapturedRows.gather", lambda rows, x: x[rows.index[:1]])
    monkeypatch.setattr("mixquant_sglang.kernels.rows.CapturedRows.scatter", lambda rows, out, high: None)
    ran: list[tuple[Role, bool, torch.Tensor]] = []
    original = type(methods[0]).apply

    def apply(method: Any, layer: torch.nn.Module, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        out = original(method, layer, x, bias)
        running = current()
        ran.append((running.role, running.rows is not None and running.rows.index[:2].tolist() == [31, -1], out))
        assert tuple(x.shape) == (32, K) and layer is method.layer
        high = F.linear(x, method.master)
        assert torch.equal(out, high) == (running.role is Role.PROTECTED)
        return out

    monkeypatch.setattr(type(methods[0]), "apply", apply)
    bf16, low = wide.calls(32)
    bf16()
    assert [(role, protects) for role, protects, _ in ran] == [(Role.PROTECTED, False)] * 4
    ran.clear()
    low()
    assert [(role, protects) for role, protects, _ in ran] == [(Role.PROMPT, True)] * 4


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, break_even.Totals | None]:
    """What this rank timed ("own") and another ("other", if there)."""
    found: dict[str, break_even.Totals | None] = {}

    def gather(out: list[Any], own: Any, group: Any) -> None:
        out[:] = [own, found["other"]]

    monkeypatch.setattr(min_tokens, "_time", lambda *_: found["own"])
    monkeypatch.setattr(min_tokens, "rank_group", lambda: "a group" if "other" in found else None)
    monkeypatch.setattr(min_tokens.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(min_tokens.dist, "all_gather_object", gather)
    return found


def chosen(run: Runtime, device: torch.device = CUDA) -> int:
    min_tokens.choose(run, SimpleNamespace(), [], [], device)
    return run.schedule.min_tokens


def test_passes_below_what_was_chosen_are_bf16(times: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times["own"] = {256: (8.0, 9.0), 512: (13.0, 12.0)}
    run = runtime("auto", HOPPER)
    assert run.state()["min_tokens"] == 1 and chosen(run) == 257 == run.state()["min_tokens"]
    assert "passes of fewer than 257 new tokens stay BF16" in caplog.text
    assert run.graphs.most_bf16_rows == 256
    for new, precision, short in ((256, "bf16", True), (257, "fp8", False)):
        scheduled = run.schedule.prefill([RequestRows(new, 0, new)], torch.device("cpu"))
        assert (scheduled.precision, scheduled.short) == (precision, short)
        run.count_prefill(scheduled)
    state = run.state()
    assert state["below_min_tokens"] == {"passes": 1, "rows": 256}
    assert state["tokens"]["prefill"] == {"bf16": 257, "fp8": 256}


def test_all_ranks_come_to_one_number(times: dict[str, Any]) -> None:
    times["own"], times["other"] = {256: (8.0, 9.0), 512: (13.0, 12.0)}, {256: (8.0, 7.0), 512: (13.0, 14.5)}
    one = chosen(runtime("auto", HOPPER))
    times["own"], times["other"] = times["other"], times["own"]
    assert one == chosen(runtime("auto", HOPPER)) == 513
    times["own"], times["other"] = {}, times["own"]  # a stage of which no layer is low
    assert chosen(runtime("auto", HOPPER)) == 513


def test_a_rank_that_could_not_time_them(times: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    times["own"], times["other"] = {256: (8.0, 9.0)}, None
    assert chosen(runtime("auto", HOPPER)) == 1 and "could not be timed on every rank" in caplog.text


@pytest.mark.parametrize(
    ("name", "device", "changes", "said"),
    [
        ("fp8", HOPPER, {"min_tokens": 9}, ""),
        ("bf16", HOPPER, {}, ""),
        ("nvfp4-emulated", HOPPER, {}, "emulated kernels are for their numbers"),
        ("auto", Device("an A100", (8, 0)), {}, "emulated kernels are for their numbers"),
        ("fp8", HOPPER, {"decode": "fp8"}, "the recipe decodes in low precision"),
        ("fp8", HOPPER, {"protect_last_prompt_token": False, "decode": "fp8"}, "the recipe decodes in low precision"),
    ],
)
def test_where_nothing_is_timed(
    times: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    name: str,
    device: Device,
    changes: dict[str, Any],
    said: str,
) -> None:
    caplog.set_level(logging.INFO)
    run = runtime(name, device, **changes)
    assert chosen(run) == changes.get("min_tokens", 1)  # ``_time`` would fail
    assert said in caplog.text if said else not caplog.text
    assert chosen(runtime("fp8", HOPPER), torch.device("cpu")) == 1


def test_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.host.hooks import launcher

    monkeypatch.setattr(launcher, "asked", launcher.Asked())
    monkeypatch.setenv(recipe.RECIPE_ENV, "fp8")
    monkeypatch.setenv(recipe.MIN_TOKENS_ENV, "7")
    parser = argparse.ArgumentParser()
    launcher.add_recipe_flag(None, parser)
    parser.parse_args([])
    assert not launcher.asked.flags and recipe.load_requested().min_tokens == 7
    parser.parse_args(["--mixquant-min-tokens", "480"])
    assert [*launcher.asked.flags] == ["--mixquant-min-tokens"] and recipe.load_requested().min_tokens == 480
    assert recipe.load_requested().name == "fp8"


def test_rules_that_decode_low(times: dict[str, Any]) -> None:
    run = runtime("fp8", HOPPER)
    selection = replace(run.selection, by_rule={"decode": ("nvfp4",)})
    assert isinstance(selection, Selection)
    run.selection = selection
    assert "decodes in low precision" in min_tokens.reason_for_one(run)


@pytest.mark.gpu
def test_timed_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What is timed is plausible, and the next start has the same numbers without timing anything."""
    from mixquant_sglang.layers.pass_times import LINEAR_FIELDS, kinds_of
    from mixquant_sglang.versions import machine

    monkeypatch.setenv("MIXQUANT_CACHE_DIR", str(tmp_path))
    run = runtime("fp8", machine.device())
    methods = linears(run, [24576, 6144, 4096, 24576], "cuda", 4096)
    file = break_even.file_of("linear", "fp8", LINEAR_FIELDS)
    layers = kinds_of(torch.nn.Module(), methods, [], protects=True)["linear", "fp8"]
    before = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    timed = break_even.load_or_time(file, layers, break_even.ROWS, CUDA, {"test": "1"})
    assert timed is not None and [*timed] == [*break_even.ROWS]
    now = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    least = break_even.least_rows(timed)
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: {break_even.describe(timed, least)}")
        for m, (bf16, low) in timed.items():
            print(f"  {m:>5} rows: BF16 {bf16:.4f} ms, low {low:.4f} ms, {bf16 / low:.3f}x")
    assert timed[4096][0] > 5 * timed[16][0], "4096 rows do 256 times the work of 16"
    assert timed[16][1] > timed[16][0], "a protected row reads the BF16 weights, and prompt rows the packed ones"
    assert timed[4096][1] < timed[4096][0] and 16 < least <= 1024
    monkeypatch.setattr(break_even, "_times", None)
    assert break_even.load_or_time(file, layers, break_even.ROWS, CUDA, {"test": "1"}) == timed


def test_the_sizes_of_bf16_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(backend="breakable", bs=[4, 8, 512, 1024])
    monkeypatch.setattr(graphs, "dialect", lambda: SimpleNamespace(prefill_graphs=lambda _: config))
    graphs.add_prefill_graphs(SimpleNamespace(), (1, 703))
    assert config.bs == [1, 4, 8, 512, 703, 1024]
    graphs.add_prefill_graphs(SimpleNamespace(), (1, 4095))  # no graph is as large, so there is nothing to share
    assert config.bs == [1, 4, 8, 512, 703, 1024]
    config.backend, config.bs = "disabled", [4]
    graphs.add_prefill_graphs(SimpleNamespace(), (1, 3))
    assert config.bs == [4]


@pytest.mark.parametrize(("decoding", "precision", "graph"), [(40, "bf16", 640), (41, "fp8", 704), (300, "bf16", 1024)])
def test_decode_rows_of_mixed_chunks(
    monkeypatch: pytest.MonkeyPatch, decoding: int, precision: str, graph: int
) -> None:
    """Those that ride on a short pass leave it a captured graph, up to as many as graphs have slots for; once it runs,
    SGLang calls it EXTEND."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.model_executor.runner import prefill_cuda_graph_runner as sglang

    from mixquant_sglang.host import runtime as host
    from mixquant_sglang.host.hooks import forward
    from mixquant_sglang.host.hooks import graphs as hooks
    from mixquant_sglang.passes import limits

    assert sglang._MAX_PREFILL_CUDA_GRAPH_PADDING_FACTOR == limits.PADDING
    run = runtime("fp8", HOPPER, min_tokens=641)
    monkeypatch.setattr(host, "_runtime", run)
    sizes = [512, 640, 704, 1024]
    model_runner = SimpleNamespace(is_draft_worker=False, device="cpu")
    runner = SimpleNamespace(capture_num_tokens=sizes, model_runner=model_runner)
    runner._pad_to_bucket = sglang.PrefillCudaGraphRunner._pad_to_bucket
    for size in reversed(sizes):
        run.graphs.captured_pass(size, max(sizes), torch.device("cpu"))
    _prompt, *answers = reqs = [SimpleNamespace(origin_input_ids=[1] * n) for n in (600, *[200] * decoding)]
    batch = SimpleNamespace(reqs=reqs, decoding_reqs=answers, prefill_stats=None)
    rows = SimpleNamespace(
        forward_mode=ForwardMode.MIXED,
        capture_hidden_mode=None,
        return_logprob=False,
        input_ids=[1] * (600 + decoding),
        extend_seq_lens_cpu=[600] + [1] * decoding,
        extend_prefix_lens_cpu=[0] + [205] * decoding,
    )
    forward.schedule_batch(rows, SimpleNamespace, batch, model_runner)
    scheduled = forward.scheduled_of(rows)
    assert scheduled is not None and scheduled.precision == precision and scheduled.short == (precision == "bf16")
    rows.forward_mode = ForwardMode.EXTEND
    assert graphs.prefill_graph_of(runner, 600 + decoding) == graph
    assert hooks.can_replay_prefill(lambda *_: True, runner, rows) == (decoding < 300)
    assert scheduled.tokens["decode", "bf16"] == decoding
    low = 599 if precision == "fp8" else 0
    assert scheduled.tokens.get(("prefill", "fp8"), 0) == low and scheduled.tokens["prefill", "bf16"] == 600 - low
