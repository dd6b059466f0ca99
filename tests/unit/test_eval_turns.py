"""eval_text --multi-turn without servers: its conversations, what it asks and checks, and its table."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.test_eval_text import BYTES, Letters

pytestmark = pytest.mark.once

pytest.importorskip("torch")

ANSWERS = ("add(a=1)\nmean(b=2)", "mul(n=3)", "ls()")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Conversations of 1, 2, 3, 1, 2, 3 turns, all with the same tool."""
    from scripts.eval.text_data import FILES

    folder = tmp_path / "data"
    folder.mkdir()
    turns = [1 + number % 3 for number in range(6)]
    rows = [
        {
            "id": i,
            "involved_classes": ["MathAPI"],
            "question": [[{"role": "user", "content": f"{i}.{t}?"}] for t in range(n)],
        }
        for i, n in enumerate(turns)
    ]
    answers = [{"id": i, "ground_truth": [text.split("\n") for text in ANSWERS[:n]]} for i, n in enumerate(turns)]
    for name, lines in zip(FILES["bfcl"], (rows, answers, [{"_api": "math_api", "name": "add"}]), strict=True):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Thinks(Letters):
    """As Qwen3's template, which puts an empty thought before the last answer."""

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        text = super().apply_chat_template(messages, tokenize, add_generation_prompt)
        before, opened, last = text.rpartition("<assistant>")
        return text if add_generation_prompt or not opened else f"{before}{opened}(){last}"


class Shouts(Letters):
    """A template that changes what was said."""

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        return super().apply_chat_template(messages, tokenize, add_generation_prompt).upper()


def said(ids: list[int]) -> str:
    return "".join(chr(one - 1) for one in ids)


# -- conversations ---


@pytest.mark.parametrize("tokenizer", [Letters(), Thinks(), Shouts()], ids=lambda one: type(one).__name__)
def test_a_prompt_is_the_one_before_it_with_its_answer_and_what_came_next(data: Path, tokenizer: Letters) -> None:
    from scripts.eval.text_data import conversations

    talks = conversations("bfcl", data, tokenizer, 60, 10_000, 100)
    assert [len(talk) for talk in talks] == [2, 3, 2, 3]  # one turn is no conversation
    plain, thinks = isinstance(tokenizer, Shouts), isinstance(tokenizer, Thinks)
    for talk in talks:
        assert [said(turn.answer) for turn in talk] == [
            f"{text}{chr(10) if plain else '<'}" for text in ANSWERS[: len(talk)]
        ]
        assert "You may call these tools" in said(talk[0].prompt) and '"name": "add"' in said(talk[0].prompt)
        for number, (turn, later) in enumerate(pairwise(talk)):
            known = [*turn.prompt, *turn.answer]
            assert later.prompt[: len(known)] == known
            thought = "()" if thinks and number + 2 == len(talk) else ""
            asked = said(later.prompt[len(known) :])
            question = f"{said(talk[0].prompt).split('.0?')[0][-1]}.{number + 1}?"
            assert asked == (
                f"\nuser: {question}\n\nassistant: " if plain else f"/><user>{question}</><assistant>{thought}"
            )


def test_a_conversation_ends_where_the_room_does_and_an_answer_at_its_limit(data: Path) -> None:
    from scripts.eval.text_data import conversations

    whole = conversations("bfcl", data, Letters(), 60, 10_000, 100)
    ends = [len(turn.prompt) + len(turn.answer) for turn in whole[1]]
    assert [len(talk) for talk in conversations("bfcl", data, Letters(), 60, ends[2], 100)] == [2, 3, 2, 3]
    assert [len(talk) for talk in conversations("bfcl", data, Letters(), 60, ends[2] - 1, 100)] == [2, 2, 2, 2]
    with pytest.raises(SystemExit, match="bfcl has no conversation of which two turns fit into"):
        conversations("bfcl", data, Letters(), 60, ends[1] - 1, 100)
    cut = conversations("bfcl", data, Letters(), 60, 10_000, 5)
    assert [[turn.prompt for turn in talk] for talk in cut] == [[turn.prompt for turn in talk] for talk in whole]
    assert [[turn.answer for turn in talk] for talk in cut] == [[turn.answer[:5] for turn in talk] for talk in whole]
    assert conversations("bfcl", data, Letters(), 2, 10_000, 100) == [whole[0], whole[2]]
    led = conversations("bfcl", data, Letters(lead=(0,)), 1, 10_000, 100)[0]
    assert led[0].prompt == [0, *whole[0][0].prompt] and led[1].prompt == [0, *whole[0][1].prompt]


def test_a_group_is_what_the_pool_holds_to_its_end(data: Path) -> None:
    from scripts.eval.text_data import conversations
    from scripts.eval.text_turns import SLACK, groups

    talks = conversations("bfcl", data, Letters(), 60, 10_000, 100)
    needs = [len(talk[-1].prompt) + len(talk[-1].answer) + SLACK for talk in talks]
    assert groups(talks, 10_000, 32) == [talks]
    assert groups(talks, sum(needs), 3) == [talks[:3], talks[3:]]
    assert groups(talks, sum(needs[:2]), 32) == [talks[:2], talks[2:]]
    assert groups(talks, sum(needs[:2]) - 1, 32)[0] == talks[:1]


# -- servers ---


class CachingArm:
    """A server with a radix cache that takes /generate and loses ``loss`` nats at each forced token, and as many again
    where an answer was prefilled.  ``forgets``: keeps prompts alone; ``sticks``: cannot be emptied."""

    name, log = "fake", Path("/dev/null")

    def __init__(self, loss: float = 0.0, page: int = 1, forgets: bool = False, sticks: bool = False) -> None:
        self.loss, self.page, self.forgets, self.sticks = loss, page, forgets, sticks
        self.kept: list[list[int]] = []
        self.flushed: int = 0
        self.waves: list[int] = []

    def flush(self) -> None:
        self.flushed += 1
        if not self.sticks:
            self.kept = []

    def failed(self, what: str) -> SystemExit:
        return SystemExit(f"{self.name} {what}")

    def cached(self, prompt: list[int]) -> int:
        found = 0
        for known in self.kept:
            same = next((at for at, both in enumerate(zip(known, prompt, strict=False)) if both[0] != both[1]), None)
            found = max(found, min(len(known), len(prompt) - 1) if same is None else same)
        return found - found % self.page

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        from scripts.eval.processor import LIFT, SHIFT

        assert path == "/generate"
        self.waves.append(len(body["input_ids"]))
        out = []
        for prompt, params in zip(body["input_ids"], body["sampling_params"], strict=True):
            forced, spare = params["custom_params"]["replay"], params["custom_params"]["spare"]
            assert params["ignore_eos"] and params["max_new_tokens"] == len(forced) and spare not in forced
            cached = self.cached(prompt)
            again = said(prompt).count("<assistant>") > 1 and "add(a=1)" in said(prompt[cached:])
            own = -0.1 - self.loss * (2 if again else 1)
            steps = []
            for token in forced:
                others = [one for one in range(BYTES) if one not in (spare, token)][: body["top_logprobs_num"] - 2]
                left = [(np.log1p(-np.exp(own)) - n - SHIFT, one, None) for n, one in enumerate(others, start=1)]
                steps.append([(0.0, token, None), (own + LIFT - SHIFT, spare, None), *left])
            meta = {"finish_reason": {"type": "length"}, "cached_tokens": cached, "output_top_logprobs": steps}
            out.append({"output_ids": forced, "meta_info": meta})
            self.kept.append(prompt if self.forgets else [*prompt, *forced[:-1]])
        return json.dumps(out).encode()


def client_of(arm: CachingArm) -> Any:
    from scripts.eval.arms import Client

    return Client(arm, 8, 0, ())  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [1, 16])
def test_turns_are_waves_and_find_what_they_should(data: Path, page: int) -> None:
    from scripts.eval.text_data import conversations
    from scripts.eval.text_turns import play

    talks = conversations("bfcl", data, Letters(), 60, 10_000, 100)
    kept, flushed = CachingArm(0.2, page), CachingArm(0.2, page)
    one = play(client_of(kept), talks, page, flushed=False)
    other = play(client_of(flushed), talks, page, flushed=True)
    assert kept.waves == flushed.waves == [4, 4, 2] and (kept.flushed, flushed.flushed) == (1, 3)
    assert [[a.ids for a in answers] for answers in one] == [[t.answer for t in talk] for talk in talks]
    for answers, again, talk in zip(one, other, talks, strict=True):
        for turn in range(1, len(talk)):
            had = len(talk[turn - 1].prompt) + len(talk[turn - 1].answer) - 1
            assert answers[turn].cached == had - had % page and again[turn].cached <= len(talk[0].prompt)
        assert np.array_equal(answers[0].top_logprobs, again[0].top_logprobs)  # type: ignore[arg-type]
        assert not np.array_equal(answers[1].top_logprobs, again[1].top_logprobs)  # type: ignore[arg-type]


def test_a_cache_that_forgets_or_cannot_be_emptied_is_found_out(data: Path) -> None:
    from scripts.eval.text_data import conversations
    from scripts.eval.text_turns import play

    talks = conversations("bfcl", data, Letters(), 60, 10_000, 100)
    with pytest.raises(SystemExit, match=r"kept \d+ of \d+ earlier tokens \(pages of 1\): give it more --kv-tokens"):
        play(client_of(CachingArm(forgets=True)), talks, 1, flushed=False)
    with pytest.raises(SystemExit, match=r"found \d+ tokens of a conversation in a cache that was emptied"):
        play(client_of(CachingArm(sticks=True)), talks, 1, flushed=True)
    play(client_of(CachingArm(forgets=True)), talks, 1, flushed=True)  # has nothing to keep


# -- figures ---


def part_of(logits: Any, own: Any, lengths: Any) -> Any:
    """``own``: the answers' tokens, which come last in their rows."""
    from scripts.eval.text_turns import Part

    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.array([[*(one for one in range(logits.shape[1]) if one != token), token] for token in own], dtype=np.int32)
    return Part({}, ids, np.take_along_axis(logprobs, ids, 1).astype(np.float32), np.array(lengths, dtype=np.int32))


def test_figures_are_by_turn_and_by_conversation() -> None:
    from scripts.eval.text_turns import figures

    lengths = [[2, 3, 0], [1, 2, 4]]
    own = np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1])
    base = np.zeros((12, 5))
    base[np.arange(12), own] = 4.0
    base[8, 2] = 6.0  # BF16 would not say this one: the first token of the second conversation's last turn
    worse = base.copy()
    worse[2, 0] = 7.0  # nor this the arm: the first token of the first one's second turn
    first, mine = part_of(base, own, lengths), part_of(worse, own, lengths)
    same, found = figures(first, first), figures(mine, first)
    assert [*found] == ["all", "later", "turn 1", "turn 2", "turn 3"]
    assert same["all"]["kl"] == [0, 0] and same["all"]["top1"] == [1, 1]
    assert same["all"]["exact"] == pytest.approx([1, 2 / 3]) and same["turn 3"]["exact"] == [0]
    assert found["all"]["top1"] == pytest.approx([4 / 5, 1]) and found["later"]["top1"] == pytest.approx([2 / 3, 1])
    assert found["all"]["exact"] == pytest.approx([1 / 2, 2 / 3]) and found["turn 2"]["exact"] == [0, 1]
    assert found["turn 1"]["kl"] == [0, 0] and found["turn 3"]["kl"] == [0] and found["turn 2"]["kl"][1] == 0
    at, whole = found["turn 2"]["first"][0], found["turn 2"]["kl"][0]
    assert at > 1 and whole == pytest.approx(at / 3) and found["all"]["kl"][0] == pytest.approx(at / 5)
    assert found["all"]["first"][0] == pytest.approx(at / 2) and found["later"]["first"][0] == pytest.approx(at)
    nll = -mine.logprobs[:, -1].astype(float)
    assert found["all"]["nll"] == pytest.approx([nll[:5].mean(), nll[5:].mean()], abs=1e-6)
    assert found["turn 3"]["nll"] == pytest.approx([nll[8:].mean()], abs=1e-6)
    with pytest.raises(AssertionError):
        figures(mine, part_of(base, own, [[3, 2, 0], [1, 2, 4]]))


# -- the command ---


def test_arms_are_measured_in_both_ways_and_collected(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoTokenizer

    from scripts.eval import measuring, text, text_turns

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: Letters())
    config = SimpleNamespace(vocab_size=BYTES, max_position_embeddings=1000)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda _: SimpleNamespace(get_text_config=lambda: config))
    state = {"version": "0", "precision": {}, "kernel": {"nvfp4": "emulated"}}
    monkeypatch.setattr(text, "state_of", lambda _: state)
    monkeypatch.setattr(text_turns, "page_size", lambda _: 1)
    losses = {"bf16": 0.01, "nvfp4-everywhere": 0.8, "nvfp4": 0.2}
    served: dict[str, CachingArm] = {}

    def measure(run: Any, waiting: list[str]) -> None:
        for name in waiting:
            served[name] = CachingArm(losses[name])
            run.measure(served[name], name)

    monkeypatch.setattr(measuring, "measure", measure)
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text("{}")
    base = [
        "--model",
        str(model),
        "--data",
        str(data),
        "--out",
        str(out),
        "--multi-turn",
        "--top",
        "9",
        "--draws",
        "200",
    ]
    base += ["--kv-tokens", "700"]
    text.main([*base, "--arms", "nvfp4-everywhere", "nvfp4"])
    assert {*served} == {*losses} and all(arm.waves == served["bf16"].waves for arm in served.values())
    assert len(served["bf16"].waves) > 6  # the pool holds fewer than all
    files = sorted(file.name for file in (out / "parts").iterdir())
    assert files == sorted(f"bfcl-{mode}-{arm}.npz" for mode in ("kept", "flushed") for arm in losses)
    first = capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())["results"]
    assert {name: one["examples"] for name, one in found.items()} == {
        **{"all": 4, "later": 4, "turn 1": 4, "turn 2": 4, "turn 3": 2}
    }
    kl = {name: one[0] for name, one in found["later"]["kl"]["value"].items()}
    assert kl["bf16/kept"] == 0 < kl["bf16/flushed"]  # both from the KV that decode wrote
    assert 0 < kl["nvfp4/kept"] < kl["nvfp4/flushed"] < kl["nvfp4-everywhere/kept"] < kl["nvfp4-everywhere/flushed"]
    minus = found["later"]["kl"]["minus"]
    assert minus["nvfp4/flushed - nvfp4/kept"][0] == pytest.approx(kl["nvfp4/flushed"] - kl["nvfp4/kept"])
    assert found["turn 1"]["kl"]["minus"]["nvfp4/flushed - nvfp4/kept"] == [0, 0, 0]
    back = found["later"]["kl"]["recovered"]
    assert 0 < back["nvfp4/flushed"][0] < back["nvfp4/kept"][0] < 1 and back["nvfp4-everywhere/flushed"][0] < 0
    line = json.loads(first.splitlines()[-1])
    assert line["arms"] == [*losses] and line["all"] == found["all"] and first.startswith("model (")
    assert (out / "tables.txt").read_text() in first and "turn 3 (2)" in first and "4 conversations of bfcl" in first

    served.clear()
    (out / "parts" / "bfcl-flushed-nvfp4.npz").unlink()
    text.main([*base, "--arms", "nvfp4-everywhere", "nvfp4"])
    assert [*served] == ["nvfp4"] and served["nvfp4"].flushed > len(served["nvfp4"].waves) - 1  # flushed alone
    assert capsys.readouterr().out == first
    text.main([*base, "--arms", "nvfp4-everywhere", "nvfp4", "--collect"])
    assert capsys.readouterr().out == first
    with pytest.raises(SystemExit, match="was measured with another text"):
        text.main([*base, "--arms", "nvfp4", "--answer-tokens", "4"])


def test_what_has_no_turns_is_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.eval.text import parse

    (tmp_path / "config.json").write_text("{}")
    base = ["--model", str(tmp_path), "--out", str(tmp_path / "out"), "--multi-turn"]
    args = parse([*base, "--data", str(data), "--kv-tokens", "100"])  # which no window would fit into
    assert args.sources == ["bfcl"]
    for more, message in (
        (
            ["--data", str(data), "--sources", "bfcl", "essays"],
            "essays has no conversations of several turns; bfcl has",
        ),
        (["--data", str(data), "--lengths", "512"], "--lengths: conversations are whole"),
        ([], "has no bfcl-v4-multi-turn-base-60.jsonl, which bfcl needs"),
    ):
        with pytest.raises(SystemExit):
            parse([*base, *more])
        assert message in capsys.readouterr().err
