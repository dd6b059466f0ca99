"""The soak's books can fail: a wrong answer, a lost request, a counter that is off by one, memory that grows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.load import memory
from scripts.load.books import (
    ABORTED,
    CLOSED,
    DOWN,
    GONE,
    LOST,
    MALFORMED,
    REFUSED,
    RIGHT,
    WRONG,
    Books,
    Bounds,
    Counted,
    Request,
    balance,
    bounds,
)
from scripts.load.client import Reply, parsed
from scripts.load.judge import ABORT_ALL, BURST, OUTAGE, Asked, Windows, judge
from scripts.load.malformed import MALFORMED as BODIES
from scripts.load.malformed import verdict
from scripts.load.memory import Memory
from scripts.load.problems import Agent, draw, first, prompt
from scripts.load.rounds import CALM, CUT, PRESSED, Life, Rounds
from scripts.load.target import Target, differs, metrics, together

pytestmark = pytest.mark.once

AGENTS = draw(7, 4, 5)
WHOLE = Request(RIGHT, prompt=300, cached=100, generated=20, most=24, retractions=0)


# -- what a request may have run ---


def test_rows_of_a_whole_answer_are_exact() -> None:
    assert bounds(WHOLE) == Bounds((199, 199), (1, 1), (19, 20))
    assert bounds(replace(WHOLE, bf16=True)) == Bounds((0, 0), (200, 200), (19, 20))
    assert bounds(replace(WHOLE, cached=299)) == Bounds((0, 0), (1, 1), (19, 20)), "a full hit runs its last token"
    assert bounds(WHOLE, knows_cache=False) == Bounds((0, 299), (1, 1), (19, 20))
    for end in (REFUSED, MALFORMED):
        assert bounds(Request(end, prompt=300, most=24)) == Bounds()


def test_rows_of_retracted_and_cut_requests_have_bounds() -> None:
    again = bounds(replace(WHOLE, retractions=1))
    assert again == Bounds((0, 199 + 324), (1, 1 + 25), (18, 21))
    told = bounds(WHOLE, may_retract=3)
    assert told == bounds(WHOLE), "an answer that says how often it was retracted is believed"
    assert bounds(replace(WHOLE, retractions=None), may_retract=1) == again
    cut = bounds(Request(CLOSED, prompt=300, cached=100, generated=5, most=24))
    assert cut == Bounds((199, 199), (1, 1), (4, 25)), "its prompt was prefilled to the end"
    for end in (GONE, ABORTED, DOWN, LOST):
        assert bounds(Request(end, prompt=300, most=24)) == Bounds((0, 300), (0, 1), (0, 25))


GOOD = Counted({("prefill", "nvfp4"): 398, ("prefill", "bf16"): 2, ("decode", "bf16"): 39}, 2)


def off(**more: int) -> Counted:
    names = {"low": ("prefill", "nvfp4"), "high": ("prefill", "bf16"), "decode": ("decode", "bf16")}
    names["decode_low"] = ("decode", "nvfp4")
    tokens = {**GOOD.tokens}
    for name, n in more.items():
        if name != "protected":
            tokens[names[name]] = tokens.get(names[name], 0) + n
    return Counted(tokens, GOOD.protected + more.get("protected", 0))


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (off(), ""),
        (off(low=1), "low prefill rows: 399 counted, 398 asked for"),
        (off(low=-1), "low prefill rows: 397 counted"),
        (off(high=1, protected=1), "BF16 prefill rows: 3 counted, 2 asked for"),
        (off(protected=-1), "protected rows: 1 counted"),
        (off(decode=2), "decode rows: 41 counted, 38 to 40"),
        (off(decode=-2), "decode rows: 37 counted"),
        (off(decode_low=1), "low decode rows: 1 counted, 0 asked for"),
    ],
)
def test_counters_that_are_off_are_told(counts: Counted, says: str) -> None:
    wrong = balance([WHOLE, WHOLE], counts, counts, pair=False, all_bf16=False)
    assert (not wrong) if not says else any(line.startswith(says) for line in wrong), wrong


def test_counters_of_a_pair_are_those_of_its_halves() -> None:
    prefill = Counted({("prefill", "nvfp4"): 398, ("prefill", "bf16"): 2}, 2)
    decode = Counted({("decode", "bf16"): 39})
    assert balance([WHOLE, WHOLE], prefill, decode, pair=True, all_bf16=False) == []
    for wrong in ((GOOD, decode), (prefill, GOOD), (replace(prefill, protected=3), decode)):
        assert balance([WHOLE, WHOLE], *wrong, pair=True, all_bf16=False)
    high = Counted({("prefill", "bf16"): 400, ("decode", "bf16"): 39}, 0)
    assert balance([WHOLE, WHOLE], high, high, pair=False, all_bf16=True) == []
    assert balance([WHOLE, WHOLE], high, high, pair=False, all_bf16=False)


def test_metrics_must_say_what_server_info_says() -> None:
    told = {"tokens": {"prefill": {"fp8": 7, "bf16": 1}, "decode": {"bf16": 3}}, "protected_rows": 1}
    line = 'mixquant:forward_tokens_total{{model_name="m",phase="{}",precision="{}",tp_rank="0"}} {}'
    rows = [("prefill", "fp8", "7.0"), ("prefill", "bf16", "1.0"), ("decode", "bf16", "3.0")]
    text = "\n".join([*(line.format(*row) for row in rows), 'mixquant:protected_rows_total{tp_rank="0"} 1.0'])
    assert differs(told, metrics(text)) == []
    assert differs(told, metrics(text.replace(" 7.0", " 8.0"))) == [
        "/metrics has 8 prefill fp8 rows, /server_info 7",
    ]
    assert differs({**told, "protected_rows": 2}, metrics(text))


def test_replicas_are_counted_together() -> None:
    first = {"tokens": {"prefill": {"fp8": 7}, "decode": {"bf16": 3}}, "protected_rows": 1, "recipe": "auto"}
    second = {"tokens": {"prefill": {"fp8": 2, "bf16": 4}, "decode": {"bf16": 5}}, "protected_rows": 4}
    told = together([first, second])
    assert told["tokens"] == {"prefill": {"fp8": 9, "bf16": 4}, "decode": {"bf16": 8}}
    assert told["protected_rows"] == 5 and told["recipe"] == "auto" and first["protected_rows"] == 1
    line = 'mixquant:forward_tokens_total{{dp_rank="{}",phase="{}",precision="{}",tp_rank="0"}} {}'
    text = "\n".join(
        line.format(rank, phase, precision, n)
        for rank, replica in enumerate((first, second))
        for phase, by in replica["tokens"].items()
        for precision, n in by.items()
    )
    text += "".join(f'\nmixquant:protected_rows_total{{dp_rank="{i}",tp_rank="0"}} {n}' for i, n in ((0, 1), (1, 4)))
    assert differs(told, metrics(text)) == []
    assert differs(first, metrics(text))


# -- what a reply is ---


def replied(text: str, **more: Any) -> Reply:
    whole = {
        "status": 200,
        "finish": "stop",
        "prompt": 300,
        "cached": 0,
        "generated": 13,
        "retractions": 0,
        "ended": 1e12,
    }
    return Reply(text=text, **{**whole, **more})


def end_of(reply: Reply, cut: str = "", window: str = "") -> Request:
    windows = Windows()
    if window:
        windows.open(window)
    return judge(Asked(AGENTS[0].asks[0], cut=cut, sent=500), reply, windows, AGENTS)


def test_an_answer_of_another_agent_is_wrong_and_says_whose_it_is() -> None:
    question, other = AGENTS[0].asks[0], AGENTS[2]
    key = question.right.partition("=")[0]
    value = next(line for line in other.records.splitlines() if line.startswith(key))
    assert end_of(replied(question.right)).end == RIGHT
    wrong = end_of(replied(value))
    assert wrong.end == WRONG and "the value of agent 2" in wrong.detail and question.right in wrong.detail
    assert end_of(replied(question.right + "1")).end == WRONG
    assert end_of(replied(question.right[:-1])).end == WRONG, "it ended too early"
    for cut in ("abort", "close"):
        assert end_of(replied(value[:9], finish=""), cut, OUTAGE).end == WRONG, "also what was cut was right so far"


@pytest.mark.parametrize(
    ("reply", "cut", "window", "end"),
    [
        (replied("", status=0, finish="", error="ServerDisconnectedError"), "", "", LOST),
        (replied("", status=0, finish="", error="ServerDisconnectedError"), "", OUTAGE, DOWN),
        (replied("", status=0, finish="", error="TimeoutError"), "close", "", LOST),
        (replied("", finish=""), "", "", LOST),
        (replied("", finish=""), "close", "", CLOSED),
        (replied("", status=0, finish=""), "leave", "", GONE),
        (replied("", finish="abort", error="Aborted"), "abort", "", ABORTED),
        (replied("", finish="abort", error="Aborted"), "", "", LOST),
        (replied("", finish="abort", error="Aborted"), "", ABORT_ALL, ABORTED),
        (replied("", status=503, finish="", error="The request queue is full."), "", BURST, REFUSED),
        (replied("", status=503, finish="", error="The request queue is full."), "", "", LOST),
        (replied("", status=500, finish="", error="Internal Server Error"), "abort", BURST, LOST),
    ],
)
def test_what_did_not_end_well_is_lost_unless_the_soak_did_it(reply: Reply, cut: str, window: str, end: str) -> None:
    found = end_of(reply, cut, window)
    assert found.end == end and found.most == AGENTS[0].asks[0].tokens
    books = Books()
    books.enter(Request(RIGHT))
    books.enter(found)
    assert books.clean() == (end != LOST)


def test_books_without_an_answer_are_not_clean() -> None:
    assert not Books().clean()


def test_windows_end() -> None:
    windows = Windows()
    at = windows.open(OUTAGE)
    assert windows.during(OUTAGE, 0, 1e12) and not windows.during(BURST, 0, 1e12)
    windows.close(at)
    end = windows.spans[at][2]
    assert windows.during(OUTAGE, end - 1, end + 5) and not windows.during(OUTAGE, end + 1, end + 5)


@pytest.mark.parametrize("sent", BODIES, ids=lambda sent: f"{sent.path} {sent.body[:30]}")
def test_malformed_bodies_want_a_4xx_that_says_why(sent: Any) -> None:
    assert verdict(sent, 400, f"because {sent.says}", router=False) == ""
    assert "where 4xx is right" in verdict(sent, 200, "{}", router=False)
    assert "where 4xx is right" in verdict(sent, 500, sent.says, router=False)
    if sent.says:
        assert f"without {sent.says!r}" in verdict(sent, 400, "no", router=False)
        assert verdict(sent, 500, sent.says, router=True)


def test_what_is_no_event_of_a_stream_is_an_error() -> None:
    assert parsed(b"") is None and parsed(b"data: [DONE]") is None
    assert parsed(b'data: {"text": "a"}') == {"text": "a"} == parsed(b'{"text": "a"}')
    assert parsed(b"Internal Server Error") == {"error": "Internal Server Error"}
    reply = Reply(status=200)
    reply.take({"error": {"message": "no"}})
    assert reply.error == "no" and not reply.whole


# -- agents ---


def test_agents_differ_in_their_values_only() -> None:
    assert draw(7, 4, 5) == AGENTS and draw(8, 4, 5) != AGENTS
    values = [line.partition("=")[2] for agent in AGENTS for line in agent.records.splitlines()]
    keys = {tuple(line.partition("=")[0] for line in agent.records.splitlines()) for agent in AGENTS}
    assert len({*values}) == len(values) == 4 * 24 and len(keys) == 1
    for agent in AGENTS:
        assert all(question.right in agent.records.splitlines() for question in agent.asks)


# -- memory ---


def test_memory_is_compared_from_when_each_sort_of_round_was_played() -> None:
    life = Life("server")
    assert life.ends() is None
    for i, kind in enumerate((CALM, CUT, PRESSED)):
        life.seen.append((kind, Memory(1000 + i, 500)))
    assert life.ends() is None, "nothing was played since"
    life.seen.append((CALM, Memory(1022, 510)))
    ends = life.ends()
    assert ends == (Memory(1002, 500), Memory(1022, 510))
    grown = ends[1].growth(ends[0])
    assert grown["host"] == pytest.approx(1.996, abs=0.01) and grown["gpu"] == pytest.approx(2)


# -- the command ---


def test_the_exit_status_and_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.load import soak

    args = soak.parse(["--minutes", "1"])
    target = Target("http://127.0.0.1:1", [], "model")
    for grown, ok in ((1005, True), (1010, False)):
        books = Books()
        books.enter(Request(RIGHT))
        rounds = Rounds.__new__(Rounds)
        seen = [(kind, Memory(1000)) for kind in (CALM, CUT, PRESSED)]
        rounds.lives = {"server": [Life("server", [*seen, (CALM, Memory(grown))])]}
        found = soak.result(args, target, rounds, books, 60)
        assert soak.tell(found) == (0 if ok else 1)
        out = capsys.readouterr().out.splitlines()
        assert json.loads(out[-1])["ok"] is ok and any("answered, right" in line for line in out)
        assert any("memory grew by 1.00%" in line for line in out) is not ok


def test_kills_are_spread_and_what_is_not_ours_is_not_killed() -> None:
    from scripts.load import soak

    assert soak.kill_times(10, 1) == [300] and soak.kill_times(9, 2) == [180, 360]
    assert soak.parse(["--pd"]).kills == 2 and soak.parse(["--url", "http://h:1"]).kills == 0
    for wrong in (["--url", "u", "--kills", "1"], ["--url", "u", "--pd"], ["--minutes", "0"], ["--round", "1"]):
        with pytest.raises(SystemExit):
            soak.parse(wrong)


def test_prompts_are_those_of_the_chat_template() -> None:
    agent: Agent = AGENTS[0]
    text = prompt([("a", "b")], "c")
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first(agent, agent.walk) == agent.walk.text and first(agent, agent.asks[0]).startswith(agent.records)


class Driver:
    """Of two GPUs: what each process holds there, None where the driver does not say."""

    def __init__(self, *gpus: dict[int, int | None]) -> None:
        self.gpus = gpus

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=1000 * (handle + 1))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.gpus[handle].items()]


@pytest.mark.parametrize(
    ("gpus", "held"),
    [
        (({7: 300, 9: 5}, {8: 400, 9: 5}), (700, False)),
        (({7: 300, 9: 5}, {9: 400}), (3000, True)),  # the second counts in another namespace
        (({7: None}, {8: 400}), (3000, True)),
    ],
)
def test_memory_is_the_servers_own_where_the_driver_tells(
    gpus: tuple[dict[int, int | None], ...], held: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(*gpus))
    assert memory.gpu_held(("0", "1"), {7, 8}) == held
    assert memory.gpu_held((), {7, 8}) == (None, False)


def test_growth_is_not_told_between_other_processes() -> None:
    assert Memory(100, 110).growth(Memory(100, 100))["gpu"] == pytest.approx(10)
    assert Memory(100, 110, gpu_shared=True).growth(Memory(100, 100))["gpu"] == float("inf")
