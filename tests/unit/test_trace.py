"""scripts/bench_trace: files, prefixes, arrivals, figures; and whole replays against a stub of a server."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import traffic
from scripts.bench.client import Answer
from scripts.bench.distributions import curve
from scripts.bench.outcomes import Level, Outcome, Slo, medians, summarise, table
from scripts.bench.trace import main, parse
from scripts.bench.traffic import BadTrace, Prompts, Request, Traffic, due, read, shared, take
from tests.support.stub_server import BROKEN, BUSY, DROPPED, FULL, OK, SHORT, SLOW, Stub, common, serve

pytestmark = pytest.mark.once

# Three turns of one conversation, and another that shares the first block with it.
ROWS = [
    (0, 1000, 5, [0, 1]),
    (3000, 1500, 3, [0, 2, 3]),
    (3000, 1700, 4, [0, 2, 4, 5]),
    (9000, 2060, 2, [0, 2, 4, 6, 7]),
]


def mooncake(file: Path, rows: list[tuple[Any, ...]] = ROWS) -> Path:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    file.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return mooncake(tmp_path / "trace.jsonl")


# -- files -------------------------------------------------------------------------------------------------------------


def test_mooncakes_requests_are_read_by_time(tmp_path: Path) -> None:
    found = read(mooncake(tmp_path / "t.jsonl", [(9000, 513, 7, [3, 4]), (4000, 512, 6, [3])]))
    assert found == [Request(0.0, 512, 6, (3,)), Request(5.0, 513, 7, (3, 4))]


def test_azures_requests_share_nothing(tmp_path: Path) -> None:
    file = tmp_path / "azure.csv"
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 23:59:59.5000009,600,10"]
    file.write_text("\r\n".join([*lines, "2023-11-17 00:00:01.7500000,600,8", ""]))
    found = read(file)
    assert [one.time for one in found] == [0.0, pytest.approx(2.25)]
    assert [(one.prompt_tokens, one.output_tokens, len(one.blocks)) for one in found] == [(600, 10, 2), (600, 8, 2)]
    assert not {*found[0].blocks} & {*found[1].blocks}
    assert shared(take(found)) == 0


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = {"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1]}


@pytest.mark.parametrize(
    "name, text, wrong",
    [
        ("t.jsonl", json.dumps(GOOD) + "\n" + json.dumps({"x": 1}), ":2: no request of Mooncake's"),
        ("t.jsonl", json.dumps({**GOOD, "input_length": 513}), ":1: 1 hash_ids for 513 tokens"),
        ("t.jsonl", json.dumps({**GOOD, "output_length": 0}), ":1: .*at least 1"),
        ("t.jsonl", json.dumps({**GOOD, "input_length": 0, "hash_ids": []}), ":1: .*at least 1"),
        ("t.jsonl", "\n", ":1: no request of Mooncake's"),
        ("t.jsonl", "", "no requests"),
        ("t.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03.9799600,5\n", ":2: no request of Azure's"),
        ("t.csv", AZURE + "2023-11-16 18:17:03.9799600,5,5\nyesterday,5,5\n", ":3: no request of Azure's"),
        ("t.csv", AZURE + "2023-11-16 18:17:03.9799600,5,0\n", ":2: .*at least 1"),
        ("t.txt", "", "neither"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(name: str, text: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadTrace, match=wrong):
        read(tmp_path / name)


# -- what is replayed --------------------------------------------------------------------------------------------------


def test_a_part_begins_at_nought(file: Path) -> None:
    some = take(read(file), skip=1, limit=2)
    assert [one.time for one in some.requests] == [0, 0] and some.of == 4
    assert [one.prompt_tokens for one in some.requests] == [1500, 1700]
    with pytest.raises(BadTrace, match="no request is left"):
        take(read(file), skip=4)


def test_long_requests_are_cut_or_dropped_and_counted(file: Path) -> None:
    cut = take(read(file), longest=1503)
    assert [(one.prompt_tokens, one.output_tokens, len(one.blocks)) for one in cut.requests] == [
        (1000, 5, 2),
        (1500, 3, 3),
        (1499, 4, 3),
        (1501, 2, 3),
    ]
    assert (cut.cut, cut.dropped, cut.longest) == (2, 0, 1503)
    dropped = take(read(file), longest=1503, drop=True)
    assert [one.prompt_tokens for one in dropped.requests] == [1000, 1500] and dropped.dropped == 2
    tiny = take(read(file), longest=3)
    assert all(one.prompt_tokens + one.output_tokens <= 3 and one.output_tokens >= 1 for one in tiny.requests)


@pytest.mark.parametrize("scale", [0.01, 0.25, 1, 1.5])
def test_scaled_prompts_share_what_they_shared(scale: float, file: Path) -> None:
    work = take(read(file), scale_input=scale, scale_output=2)
    prompts = Prompts(work, 5000, "seed")
    ids = [json.loads(b"[" + prompts.encoded(one) + b"]") for one in work.requests]
    block = work.block
    assert block == max(1, round(512 * scale))
    for one, some, (_, length, output, blocks) in zip(work.requests, ids, ROWS, strict=True):
        rest = length - 512 * (len(blocks) - 1)
        assert len(some) == one.prompt_tokens == block * (len(blocks) - 1) + max(1, round(rest * scale))
        assert one.output_tokens == 2 * output
        assert all(10 <= token < 5000 for token in some)
    assert common(ids[1], ids[2]) == common(ids[1], ids[3]) == 2 * block
    assert common(ids[2], ids[3]) == 3 * block
    assert common(ids[0], ids[3]) == block


def test_token_ids_follow_from_seed_and_block(file: Path) -> None:
    work = take(read(file))
    same = [Prompts(work, 5000, seed).encoded(work.requests[3]) for seed in ("a", "a", "b")]
    assert same[0] == same[1] != same[2]
    alone = take(read(file), skip=3)
    assert Prompts(alone, 5000, "a").encoded(alone.requests[0]) == same[0]


def test_an_endless_cache_serves_prefixes_only() -> None:
    def work(*prompts: tuple[int, tuple[int, ...]]) -> Traffic:
        return Traffic(tuple(Request(0, tokens, 1, blocks) for tokens, blocks in prompts), 10, 9)

    assert shared(work((20, (1, 2)), (30, (1, 2, 3)))) == 20 / 50
    assert shared(work((20, (1, 2)), (20, (9, 2)))) == 0  # block 2 stands elsewhere
    assert shared(work((20, (1, 2)), (20, (1, 2)))) == 19 / 40  # the last token is computed
    assert shared(work((15, (1, 2)), (30, (1, 2, 3)))) == 15 / 45  # half of block 2 was there
    assert shared(work((30, (1, 2, 3)), (15, (1, 2)))) == 14 / 45


# -- arrivals ----------------------------------------------------------------------------------------------------------


def requests(*times: float) -> list[Request]:
    return [Request(when, 1, 1, (0,)) for when in times]


def test_arrivals_keep_the_files_times_or_their_shape() -> None:
    some = requests(0, 3, 3, 9)
    assert due(some, "trace", "", speed=1) == [0, 3, 3, 9]
    assert due(some, "trace", "", speed=2) == [0, 1.5, 1.5, 4.5]
    assert due(some, "trace", "", rate=1) == pytest.approx([0, 1, 1, 3])
    assert due(some, "spread", "", speed=1) == pytest.approx([0, 3, 6, 9])
    assert due(requests(0, 0, 4, 4), "spread", "", speed=1) == pytest.approx([0, 2, 4, 6])
    assert due(requests(0), "trace", "", rate=1) == [0]


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    some = requests(*range(4000))
    times = due(some, "poisson", "s", rate=5)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)  # as large as the mean
    assert times == due(some, "poisson", "s", rate=5) != due(some, "poisson", "t", rate=5)
    assert statistics.fmean(due(some, "poisson", "s", speed=5)) == pytest.approx(statistics.fmean(times))


@pytest.mark.parametrize("arrivals, pace", [("trace", "rate"), ("spread", "rate"), ("poisson", "speed")])
def test_times_without_a_rate_are_refused(arrivals: str, pace: str) -> None:
    with pytest.raises(BadTrace, match="the same time"):
        due(requests(0, 0, 0), arrivals, "", **{pace: 2.0})
    assert len(due(requests(0, 0, 0), "poisson", "", rate=2)) == 3


# -- figures -----------------------------------------------------------------------------------------------------------


def outcome(ttft: float, *gaps: float, late: float = 0.0) -> Outcome:
    answer = Answer([7] * (1 + len(gaps)), 10, 4, ttft, ttft + sum(gaps), [(gap, 1) for gap in gaps])
    return Outcome(late, answer)


LOST = [Outcome(0.0, refused=True, why="full"), Outcome(0.0, why="broken")]


def test_what_was_lost_misses_every_limit_and_has_no_times() -> None:
    outcomes = [outcome(0.1, 0.01, 0.03), outcome(0.3, 0.01, 0.05), outcome(0.1, 0.2), outcome(0.2), *LOST]
    found = summarise(outcomes, 2.0, Slo(ttft=200, itl=25), gpus=2)
    assert found["ttft_p50_ms"] == pytest.approx(150) and found["ttft_p99_ms"] == pytest.approx(297)
    assert found["itl_p50_ms"] == pytest.approx(30) and found["itl_p95_ms"] == pytest.approx(170)
    assert found["latency_p50_ms"] == pytest.approx(250)
    assert found["slo_ttft_attainment"] == 3 / 6
    assert found["slo_itl_attainment"] == 2 / 6  # means of 20, 30 and 200 ms, and one token without
    assert found["slo_attainment"] == 2 / 6 and found["goodput_per_s"] == 1
    assert found["requests_per_s"] == 2 and found["output_tokens_per_s"] == 4.5
    assert found["output_tokens_per_s_per_gpu"] == 2.25 and found["cache_hit_rate"] == 0.4


def test_without_limits_there_is_no_attainment() -> None:
    found = summarise([outcome(0.1)], 1.0, Slo())
    assert not {key for key in found if "slo" in key or "goodput" in key}
    assert found["itl_p50_ms"] is None
    one_limit = summarise([outcome(0.1, 9.0)], 1.0, Slo(ttft=200))
    assert one_limit["slo_attainment"] == 1


def test_gaps_count_by_token() -> None:
    one = Outcome(0.0, Answer([1] * 5, 10, 0, 0.1, 1.0, [(0.3, 3), (0.5, 1)]))
    assert one.itl() == pytest.approx([100, 100, 100, 500])


def test_the_table_says_ratios_and_losses() -> None:
    def level(outcomes: list[Outcome]) -> Level:
        return Level([summarise(outcomes, 2.0, Slo(200, 25))], outcomes)

    text = table({"one": level([outcome(0.2, 0.02)]), "two": level([outcome(0.1, 0.01), *LOST])})
    rows = {line[:12].strip(): line[12:] for line in text.splitlines()}
    assert "200.00 (1.000x)" in rows["ttft p50"] and "100.00 (2.000x)" in rows["ttft p50"]
    assert "(2.000x)" in rows["itl p95"] and rows["tok/s"].count("(1.000x)") == 2
    assert rows["slo"].split() == ["100.0%", "33.3%"]
    assert rows["refused"].split() == rows["failed"].split() == ["0", "of", "1", "1", "of", "3"]
    assert "  two: 1x full" in text and "  two: 1x broken" in text


def test_rare_reasons_are_counted_together() -> None:
    level = Level(outcomes=[Outcome(0.0, why=f"reason {i}") for i in range(7)] + [Outcome(0.0, why="reason 0")])
    assert level.reasons(2) == {"reason 0": 2, "reason 1": 1, "other reasons": 5}
    assert level.lost() == {"refused": 0, "failed": 8}


def test_medians_leave_out_what_was_not_measured() -> None:
    assert medians([{"a": 1.0, "b": None}, {"a": 5.0, "b": None}, {"a": 2.0, "b": None}]) == {"a": 2.0, "b": None}


def test_a_curve_ends_at_the_share_that_was_answered() -> None:
    assert curve([3.0, 1.0], 4) == ([1.0, 3.0, 3.0], [0.25, 0.5, 0.5])
    many, shares = curve([float(i) for i in range(5000)], 5000)
    assert len(many) <= 1002 and many[-1] == 4999 and shares[-1] == 1
    assert curve([], 4) == ([], [])


# -- replays -----------------------------------------------------------------------------------------------------------


def run(stubs: list[Stub], file: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[str, dict[str, Any]]:
    arms = [word for i, stub in enumerate(stubs) for word in ("--url", f"arm{i}", stub.url, "1")]
    main(["--file", str(file), "--arms", "none", "--logs", str(file.parent), "--vocab", "5000", *arms, *more])
    *text, last = capsys.readouterr().out.splitlines()
    return "\n".join(text), json.loads(last)


@pytest.mark.slow
def test_a_replay_sends_what_the_file_has_when_it_is_due(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An open loop: these servers answer nothing before all four requests have come.
    with serve(Stub(together=4, first_s=1)) as one, serve(Stub(together=4)) as two:
        text, facts = run([one, two], file, capsys, "--speed", "15", "--rounds", "2", "--slo-ttft", "1000")
    work = take(read(file))
    for stub in (one, two):
        assert stub.flushed == [0, 4, 8] and len(stub.seen) == 12  # the warm-up, and two rounds
        for n in (4, 8):
            sent = stub.seen[n : n + 4]
            assert sorted((len(prompt), tokens) for _, prompt, tokens in sent) == [(row[1], row[2]) for row in ROWS]
            assert (len(sent[0][1]), len(sent[3][1])) == (1000, 2060)  # due at 0 and 0.6 s
            assert sent[3][0] - sent[0][0] > 0.3
        assert stub.seen[4][1] != stub.seen[8][1]  # a round has other tokens
    for a, b in ((4, 8), (8, 12)):
        assert sorted(prompt for _, prompt, _ in one.seen[a:b]) == sorted(prompt for _, prompt, _ in two.seen[a:b])
    measured = facts["medians"]["speed 15"]
    for name in ("arm0", "arm1"):
        assert measured[name]["cache_hit_rate"] == pytest.approx(shared(work), abs=0.001)
    assert measured["arm0"]["ttft_p50_ms"] > 1000 > measured["arm1"]["ttft_p50_ms"]
    assert measured["arm0"]["slo_attainment"] == 0 < measured["arm1"]["slo_attainment"]
    assert facts["lost"]["speed 15"]["arm1"] == {"refused": 0, "failed": 0, "of": 8, "reasons": {}}
    assert facts["baseline"] == "arm0" and facts["workload"]["shared"] == shared(work)
    assert len(facts["by_round"]["speed 15"]["arm0"]) == 2
    assert "trace.jsonl: 4 of 4 requests" in text and "speed 15, arrivals: trace" in text


def test_first_tokens_are_timed_from_when_they_were_due(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is late hides nothing."""
    encoded = Prompts.encoded

    def slow(self: Prompts, one: Request) -> bytes:
        time.sleep(0.1)
        return encoded(self, one)

    monkeypatch.setattr(Prompts, "encoded", slow)
    with serve(Stub()) as stub:
        _, facts = run([stub], file, capsys, "--rate", "1000", "--limit", "3")
    found = facts["medians"]["rate 1000"]["arm0"]
    assert found["ttft_p50_ms"] > 180 and found["late_p99_ms"] > 280


@pytest.mark.slow
def test_every_loss_is_counted_and_said(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ends = [BUSY, FULL, BROKEN, SHORT, SLOW, OK, FULL, DROPPED]
    many = mooncake(tmp_path / "many.jsonl", [(100 * i, 20, 3, [i]) for i in range(len(ends))])
    warm_up = len(ends)
    with serve(Stub(lambda n: ends[n - warm_up] if n >= warm_up else OK)) as stub:
        text, facts = run([stub], many, capsys, "--speed", "1", "--request-limit", "2", "--slo-ttft", "9000")
    lost = facts["lost"]["speed 1"]["arm0"]
    assert (lost["refused"], lost["failed"], lost["of"]) == (3, 4, 8)
    assert lost["reasons"] == {
        "the server aborted: The request queue is full.": 2,
        "the server answered 503: b'busy'": 1,
        "the server generated 1 tokens, not 3": 1,
        "the server generated 2 tokens, not 3": 1,
        "no whole answer within 2 s": 1,
        "other reasons": 1,
    }
    assert facts["medians"]["speed 1"]["arm0"]["slo_attainment"] == 1 / 8
    assert "3 of 8" in text and "4 of 8" in text and "arm0: 2x the server aborted: The request queue is full." in text


def test_an_arm_that_answers_nothing_ends_the_benchmark(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Stub(lambda n: BUSY)) as stub, pytest.raises(SystemExit, match=r"answered none of 4 requests.*503"):
        run([stub], file, capsys, "--rate", "1000")


@pytest.mark.slow
def test_both_distributions_are_drawn(file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.svg"
    with serve(Stub()) as stub:
        run([stub], file, capsys, "--rate", "100", "200", "--plot", str(plot), "--slo-itl", "40")
    assert plot.read_text().count('<g id="axes_') == 4


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("--rate 0", "--rate"),
        ("--rate 1 --speed 1", "--speed"),
        ("", "--rate"),
        ("--rate 1 --limit 0", "--limit"),
        ("--rate 1 --drop", "--drop"),
        ("--rate 1 --skip 4", "no request is left"),
        ("--rate 1 --scale-input 0", "--scale-input"),
        ("--rate 1 --plot there.jpg", "--plot"),
        ("--rate 1 --kv-tokens 2000", "a request has 2062 tokens, a server holds 1992"),
        ("--rate 1 -- --context-length 2060", "a request has 2062 tokens, a server holds 2052"),
        ("--rate 1 --skip 1 --limit 2 --arrivals trace", "the same time"),
        ("--rate 1 --url two http://a:1,http://b:1 2", "one URL"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    wrong: str, reason: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--file", str(file), "--logs", str(file.parent), *wrong.split()])
    assert reason in capsys.readouterr().err


def test_arms_stream_new_tokens_only(file: Path) -> None:
    args, work = parse(["--file", str(file), "--logs", str(file.parent), "--rate", "2", "0.5", "--longest", "1500"])
    assert args.flags == ["--incremental-streaming-output"]
    assert args.levels == {"rate 2": {"rate": 2}, "rate 0.5": {"rate": 0.5}}
    assert work.cut == 3 and traffic.BLOCK == 512
