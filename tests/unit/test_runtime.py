from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.kernels.rows import GraphRows
from mixquant_sglang.passes.limits import GRAPH_ROWS
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.passes.running import PROTECTED_PASS
from mixquant_sglang.passes.schedule import ScheduledPass
from mixquant_sglang.recipe.roles import Kind, Role, by_role
from mixquant_sglang.recipe.select import Device, select

CPU = torch.device("cpu")
MIXED = [RequestRows(100, 0, 100), RequestRows(1, 40, 30, decoding=True)]


def make(name: str = "nvfp4", **changes: object) -> Runtime:
    asked = replace(recipe.load(name), **changes)
    return Runtime(asked, select(asked, Device("this CPU", None)))


def tokens(plan: ScheduledPass) -> dict[tuple[str, str], int]:
    return {key: n for key, n in plan.tokens.items() if n}


def test_a_mixed_pass() -> None:
    plan = make().schedule.prefill(MIXED, CPU)
    assert plan.running.role is Role.PROMPT and plan.running.rows is not None and plan.running.rows.tokens == 101
    assert tokens(plan) == {("prefill", "nvfp4"): 99, ("prefill", "bf16"): 1, ("decode", "bf16"): 1}
    assert plan.protected == ((99, 101),) and plan.protected_total == 2 and plan.precision == "nvfp4"


def test_a_middle_chunk_needs_no_rows() -> None:
    plan = make().schedule.prefill([RequestRows(128, 0, 300)], CPU)
    assert plan.running.rows is None and tokens(plan) == {("prefill", "nvfp4"): 128}


def test_a_pass_of_protected_rows_alone_is_bf16_whole() -> None:
    plan = make().schedule.prefill([RequestRows(1, 299, 300), RequestRows(1, 9, 5, decoding=True)], CPU)
    assert plan.running is PROTECTED_PASS and plan.precision == "bf16" and plan.protected_total == 2
    assert tokens(plan) == {("prefill", "bf16"): 1, ("decode", "bf16"): 1}


def test_short_passes_stay_bf16_and_protect_nothing() -> None:
    run = make(min_tokens=101)
    plan = run.schedule.prefill(MIXED, CPU)
    assert plan.running is PROTECTED_PASS and plan.protected_total == 0
    assert tokens(plan) == {("prefill", "bf16"): 100, ("decode", "bf16"): 1}
    assert run.schedule.prefill([RequestRows(101, 0, 900)], CPU).precision == "nvfp4"
    assert make().schedule.prefill([RequestRows(2, 0, 900)], CPU).precision == "nvfp4"  # however few rows


def test_without_last_token_protection() -> None:
    plan = make(protect_last_prompt_token=False).schedule.prefill(MIXED, CPU)
    assert plan.protected == ((100, 101),)
    assert tokens(plan) == {("prefill", "nvfp4"): 100, ("decode", "bf16"): 1}


def test_equal_phases_have_nothing_to_protect() -> None:
    for name, precision in (("bf16", "bf16"), ("nvfp4-everywhere", "nvfp4")):
        plan = make(name).schedule.prefill(MIXED, CPU)
        assert plan.running.role is Role.PROMPT and plan.running.rows is None and plan.protected_total == 0
        assert tokens(plan) == {("prefill", precision): 100, ("decode", precision): 1}


def test_decode_only_low_precision() -> None:
    plan = make("bf16", decode="nvfp4").schedule.prefill(MIXED, CPU)
    assert tokens(plan) == {("prefill", "bf16"): 99, ("prefill", "nvfp4"): 1, ("decode", "nvfp4"): 1}


def test_which_passes_a_captured_graph_computes() -> None:
    run = make()
    many = [RequestRows(2, 0, 2) for _ in range(GRAPH_ROWS + 1)]
    assert GRAPH_ROWS == 256
    fits, too_many = run.schedule.prefill(many[:-1], CPU), run.schedule.prefill(many, CPU)
    whole = run.schedule.prefill([RequestRows(1, 299, 300)], CPU)
    assert not run.graphs.can_replay(fits)  # no graphs were captured with an index buffer
    assert run.graphs.can_replay(run.schedule.prefill([RequestRows(128, 0, 300)], CPU))
    run.graphs.protected = GraphRows(GRAPH_ROWS, 8192, CPU)
    assert run.graphs.can_replay(fits) and not run.graphs.can_replay(too_many) and not run.graphs.can_replay(whole)
    for count, new, replays in ((64, 64, True), (65, 63, True), (65, 64, False)):  # 4096, 4095 and 4160 rows
        long = run.schedule.prefill([RequestRows(new, 0, new) for _ in range(count)], CPU)
        assert run.graphs.can_replay(long) == replays and long.protected_total == count
    run.graphs.captured_pass(8, 8192, CPU)
    run.weights.hold("an update is open")
    assert not run.graphs.can_replay(run.schedule.prefill(many[:-1], CPU))
    assert make("bf16").graphs.can_replay(make("bf16").schedule.prefill(MIXED, CPU))


def test_graphs_below_min_tokens_are_bf16() -> None:
    """A graph that no low pass fits into is captured in plain BF16, and replayed by passes that are BF16 whole."""
    run = make(min_tokens=101)
    assert run.graphs.most_bf16_rows == 100 and make().graphs.most_bf16_rows == 0
    low = run.graphs.captured_pass(101, 8192, CPU)
    assert run.graphs.captured_pass(100, 8192, CPU) is run.graphs.captured_pass(4, 8192, CPU) is PROTECTED_PASS
    assert low.role is Role.PROMPT and low.rows is not None and low.read is None
    short = run.schedule.prefill([RequestRows(90, 0, 90)], CPU)
    assert short.precision == "bf16" and tokens(short) == {("prefill", "bf16"): 90}
    assert (
        run.graphs.can_replay(short, 90) and run.graphs.can_replay(short, 100) and not run.graphs.can_replay(short, 104)
    )
    asked_bf16 = run.schedule.prefill([RequestRows(80, 0, 90, bf16=True)], CPU)
    assert run.graphs.can_replay(asked_bf16, 96)  # more protected rows than graphs have slots
    run.graphs.load(asked_bf16)
    assert run.graphs.protected is not None and run.graphs.protected.index.tolist() == [-1] * GRAPH_ROWS
    long = run.schedule.prefill([RequestRows(101, 0, 900)], CPU)
    assert run.graphs.can_replay(long, 104) and not run.graphs.can_replay(long, 100)
    whole = run.schedule.prefill([RequestRows(200, 0, 200, bf16=True)], CPU)
    assert whole.running is PROTECTED_PASS and not run.graphs.can_replay(whole, 256)
    run.weights._moved = "a.layer"
    assert run.graphs.can_replay(short, 100) and not run.graphs.can_replay(long, 104)  # they hold no packed weight


DECODING = RequestRows(1, 40, 30, decoding=True)


def captured(run: Runtime, *sizes: int) -> Runtime:
    for size in sorted(sizes, reverse=True):
        run.graphs.captured_pass(size, max(sizes), CPU)
    return run


def test_decode_rows_that_make_a_short_pass_long_leave_it_a_graph() -> None:
    """BF16 graphs end below ``min_tokens``, so that such a pass is low where a graph computes it so."""
    run = captured(make(min_tokens=101), 64, 100, 104, 128, 512)
    fits = run.schedule.prefill([RequestRows(96, 0, 96)] + [DECODING] * 4, CPU)
    assert fits.short and fits.running is PROTECTED_PASS and run.graphs.can_replay(fits, 100)
    for prompt, decoding, graph in ((97, 4, 104), (61, 60, 128), (99, 200, 512)):
        long = run.schedule.prefill([RequestRows(prompt, 0, prompt)] + [DECODING] * decoding, CPU)
        assert long.precision == "nvfp4" and not long.short and run.graphs.can_replay(long, graph)
        assert long.protected == ((prompt - 1, prompt + decoding),)
        assert tokens(long) == {
            ("prefill", "nvfp4"): prompt - 1,
            ("prefill", "bf16"): 1,
            ("decode", "bf16"): decoding,
        }
    run.schedule.prunes = True  # then graphs leave out what input logprobs read
    requests = [RequestRows(97, 0, 97)] + [DECODING] * 4
    assert run.schedule.prefill(requests, CPU, reads_all=True).short
    assert not run.schedule.prefill(requests, CPU).short


def test_where_decode_rows_do_not_count_for_min_tokens() -> None:
    """Where no captured graph computes the pass in low precision: launched one by one, its kernels are more."""

    def short(run: Runtime, prompt: int = 90, decoding: int = 40, **more: bool) -> bool:
        requests = [RequestRows(prompt, 0, prompt, **more)] + [DECODING] * decoding
        plan = run.schedule.prefill(requests, CPU)
        assert not plan.short or plan.running is PROTECTED_PASS
        return plan.short

    assert not short(captured(make(min_tokens=101), 100, 256))
    assert short(make(min_tokens=101)), "no graphs were captured"
    assert short(captured(make(min_tokens=101), 100, 512)), "SGLang pads to no more than twice the rows"
    assert short(captured(make(min_tokens=101), 100, 104)), "the largest graph has fewer rows"
    assert short(captured(make(min_tokens=101), 100, 512), 90, GRAPH_ROWS), "more protected rows than slots"
    assert short(captured(make(min_tokens=101), 100, 256), bf16=True), "all rows are BF16"
    assert short(captured(make(min_tokens=101, protect_last_prompt_token=False), 100, 256)), "graphs have no slots"
    many = [RequestRows(4000, 0, 4000)] + [DECODING] * 100  # a low pass that protects so many has no graph
    assert captured(make(min_tokens=4097), 4096, 8192).schedule.prefill(many, CPU).short
    by_request = captured(make(min_tokens=101), 100, 256)
    by_request.schedule.by_request = True  # rows keep their bits whoever is beside them
    assert short(by_request)
    experts = captured(make(min_tokens=101), 100, 256)
    experts.weights.layers[:] = [SimpleNamespace(kind=Kind.EXPERTS, precision=by_role("nvfp4", "bf16"))]  # type: ignore[list-item]
    assert short(experts), "decode rows read most experts a second time"


def test_bf16_graphs_of_a_pruned_last_layer_compute_all_rows() -> None:
    run = make(min_tokens=101)
    run.schedule.prunes = True
    assert (
        run.graphs.captured_pass(96, 8192, CPU).read is None
        and run.graphs.captured_pass(104, 8192, CPU).read is not None
    )
    for reads_all in (False, True):  # input logprobs
        assert run.graphs.can_replay(run.schedule.prefill([RequestRows(90, 0, 90)], CPU, reads_all=reads_all), 96)
        assert (
            run.graphs.can_replay(run.schedule.prefill([RequestRows(101, 0, 101)], CPU, reads_all=reads_all))
            != reads_all
        )


def test_equal_phases_have_one_kind_of_graph() -> None:
    run = make("bf16", min_tokens=50)
    run.schedule.split = False  # as finish_load finds out
    assert run.graphs.most_bf16_rows == 0 and run.graphs.captured_pass(8, 64, CPU).role is Role.PROMPT
    assert run.graphs.can_replay(run.schedule.prefill([RequestRows(8, 0, 8)], CPU), 8)


def test_a_bf16_recipe_replays_its_graphs_whatever_an_update_does() -> None:
    """As SGLang does: no copy of ours can be out of date."""
    run = make("bf16")
    run.weights.hold("a weight update failed")
    assert run.graphs.can_replay(run.schedule.prefill(MIXED, CPU)) and run.graphs.can_replay_decode()
    low = make()
    low.weights.hold("a weight update failed")
    assert not low.graphs.can_replay(low.schedule.prefill(MIXED, CPU))


def test_which_bf16_passes_have_no_graph_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def said(sizes: list[int], **changes: object) -> list[str]:
        caplog.clear()
        run = make(**changes)
        run.graphs.log(sizes)
        run.graphs.log(sizes)
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level("INFO", logger="mixquant_sglang.passes.graphs"):
        assert said([4, 8, 64]) == []
        (all_of_them,) = said([4, 8, 64, 100, 128], min_tokens=101)
        (some,) = said([4, 8, 64, 128], min_tokens=101)
        (none,) = said([128, 256], min_tokens=101)
    assert all_of_them.endswith("of up to 100 rows are captured in BF16, for passes below min_tokens = 101")
    assert some.endswith("such passes of 65 to 100 rows run without a graph") and "up to 64 rows" in some
    assert none.endswith("such passes of 1 to 100 rows run without a graph") and "up to 0 rows" in none


def test_passes_without_protected_rows_replay_graphs_however_large() -> None:
    """Launched one by one, 8192 rows of Qwen3-8B took a busy host 170 to 190 ms instead of 110."""
    run = make()
    middle, short = (run.schedule.prefill([RequestRows(n, 0, 9000)], CPU) for n in (8192, 2048))
    last = run.schedule.prefill([RequestRows(8192, 808, 9000)], CPU)
    run.graphs.captured_pass(8192, 8192, CPU)
    assert not middle.protected and last.protected
    assert run.graphs.can_replay(short) and run.graphs.can_replay(last) and run.graphs.can_replay(middle)


def test_which_rows_the_last_layer_computes() -> None:
    def plan_of(requests: list[RequestRows], *, protect: bool = True, **more: bool) -> tuple[Runtime, ScheduledPass]:
        run = make(protect_last_prompt_token=protect)
        run.schedule.prunes = True
        return run, run.schedule.prefill(requests, CPU, **more)

    _, plan = plan_of(MIXED)
    assert plan.read == ((99, 101),) and plan.running.read is plan.running.rows
    _, plan = plan_of([RequestRows(128, 0, 300)])  # a middle chunk: what is sampled from it is thrown away
    assert plan.read == () and plan.running.rows is None
    assert plan.running.read is not None and len(plan.running.read.index) == 0
    _, plan = plan_of(MIXED, protect=False)
    assert plan.read == ((99, 100), (100, 101)) and plan.protected == ((100, 101),)
    assert plan.running.read is not None and plan.running.read.index.tolist() == [99, 100]
    _, plan = plan_of(MIXED, reads_all=True)
    assert plan.read is None and plan.running.read is None and plan.running.rows is not None
    assert make().schedule.prefill(MIXED, CPU).read is None


def test_which_rows_the_last_layers_attention_computes() -> None:
    def queries(run: Runtime, requests: list[RequestRows], **more: bool) -> list[int] | None:
        found = run.schedule.prefill(requests, CPU, **more).running.queries
        return None if found is None else found.index.tolist()

    long = [RequestRows(2048, 0, 2048), RequestRows(8, 300, 305), RequestRows(64, 0, 900)]
    run = make()
    run.schedule.prunes = True
    assert queries(run, long) is None  # the attention back end is another
    run.schedule.prunes_attention = True
    assert queries(run, long) == [2047, 2052, 2053, 2054, 2055, 2119]
    assert queries(run, [RequestRows(32, 1 << 16, 1 << 17)]) == [31]
    assert queries(run, long, reads_all=True) is None
    assert queries(run, [RequestRows(1024, 0, 1024)]) is None  # too short to be worth it
    assert queries(run, [*long, RequestRows(0, 5, 5)]) is None
    assert queries(run, [RequestRows(2048, 0, 2048, bf16=True)]) is None
    assert run.graphs.captured_pass(4096, 8192, CPU).queries is None
    unprotected = make(protect_last_prompt_token=False)
    unprotected.schedule.prunes = unprotected.schedule.prunes_attention = True
    assert queries(unprotected, long) == [2047, 2055, 2119]


def test_graphs_of_a_pruned_last_layer() -> None:
    run = make()
    run.schedule.prunes = True
    captured = run.graphs.captured_pass(128, 8192, CPU)
    assert captured.read is captured.rows is not None
    assert run.graphs.can_replay(run.schedule.prefill(MIXED, CPU)) and not run.graphs.can_replay(
        run.schedule.prefill(MIXED, CPU, reads_all=True)
    )
    unprotected = make(protect_last_prompt_token=False)
    unprotected.schedule.prunes = True
    captured = unprotected.graphs.captured_pass(128, 8192, CPU)
    assert captured.rows is None and captured.read is not None
    plan = unprotected.schedule.prefill([RequestRows(100, 0, 100), RequestRows(20, 0, 90)], CPU)
    assert unprotected.graphs.can_replay(plan)
    unprotected.graphs.load(plan)
    assert captured.read.index.tolist()[:3] == [99, 119, -1]
    assert not unprotected.graphs.can_replay(unprotected.schedule.prefill(MIXED, CPU))  # decode rows are protected
    many = [RequestRows(2, 0, 2) for _ in range(GRAPH_ROWS + 1)]
    assert not unprotected.graphs.can_replay(unprotected.schedule.prefill(many, CPU))


def test_counters_and_state() -> None:
    run = make()
    run.count_prefill(run.schedule.prefill(MIXED, CPU))
    run.count_decode(3)
    state = run.state()
    assert state["tokens"] == {"prefill": {"bf16": 1, "nvfp4": 99}, "decode": {"bf16": 4}}
    assert state["passes"] == {"prefill": 1, "decode": 1} and state["protected_rows"] == 2
    assert state["kernel"] == {"nvfp4": "emulated"} and state["precision"] == {"prefill": "nvfp4", "decode": "bf16"}


def test_graphs_of_experts_have_fewer_slots() -> None:
    run = make()
    for kind, precision, slots in (
        (Kind.LINEAR, "nvfp4", 256),
        (Kind.EXPERTS, "bf16", 256),
        (Kind.EXPERTS, "nvfp4", 64),
    ):
        run.weights.layers[:] = [SimpleNamespace(kind=kind, precision=by_role(precision, "bf16"))]  # type: ignore[list-item]
        assert run.graphs.slots == slots


def test_extra_bytes_are_those_beside_the_bf16_weights() -> None:
    """As ``mixquant plan`` counts: packed weights that replace BF16 ones leave fewer bytes than there were."""
    from types import SimpleNamespace
    from typing import Any, cast

    from mixquant_sglang.host.runtime import Runtime
    from mixquant_sglang.recipe import load
    from mixquant_sglang.recipe.select import Device, select

    for name, dropped, extra in (("fp8", 0, 30), ("fp8-compact", 60, -30)):
        run = Runtime(asked := load(name), select(asked, Device("this CPU", None)))
        run.weights.layers.append(cast("Any", SimpleNamespace(extra_bytes=30)))
        run.bf16_linear_bytes, run.dropped_bytes = 100, dropped
        assert (run.extra_weight_bytes, run.packed_weight_bytes, run.linear_weight_bytes) == (extra, 30, 100 + extra)
