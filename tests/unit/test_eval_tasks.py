"""eval_tasks without servers: its prompts, its waves, what it draws, and its table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.once

torch = pytest.importorskip("torch")

END = 1


class Letters:
    """A tokenizer of single characters with ChatML's template."""

    chat_template: str | None = "chatml"
    eos_token_id = END

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[2 + ord(letter) for letter in text])

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token - 2) for token in ids)

    def apply_chat_template(
        self, messages: Any, tokenize: bool, add_generation_prompt: bool, enable_thinking: bool
    ) -> str:
        assert not enable_thinking
        return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + "<assistant>"

    def convert_tokens_to_ids(self, token: str) -> None:
        return None

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(70000)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i} + 1.\n#### {i + 1}"} for i in range(8)]
    mathematics = [{"problem": f"{i}?", "solution": "So.", "answer": str(i), "unique_id": f"u{i}"} for i in range(5)]
    for name, every in (("gsm8k-test.jsonl", rows), ("math500.jsonl", mathematics)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in every))
    (tmp_path / "paul-graham-essays.txt").write_text("One thing after another. " * 900)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def parsed(folder: Path, *more: str) -> Any:
    from scripts.eval.tasks import parse

    return parse(["--model", str(folder), "--data", str(folder), "--out", str(folder / "out"), *more])


def run_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    import transformers

    from scripts.eval.tasks import Run

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: Letters())
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=40000))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda _: config)
    return Run(parsed(folder, *more))


def test_every_number_of_shots_asks_the_same_problems(folder: Path) -> None:
    from scripts.eval.tasks_data import cells_of, problems

    args = parsed(folder, "--tasks", "gsm8k", "math500", "--shots", "0", "3")
    assert cells_of(args) == [("gsm8k", 0), ("gsm8k", 3), ("math500", 0)]
    bare, behind, mathematics = (problems(cell, args, Letters()) for cell in cells_of(args))
    assert [one.id for one in bare] == [one.id for one in behind] == ["0", "1", "2", "3", "4"]
    text = Letters().decode(behind[2].prompt)
    assert text.startswith("<user>Put your final answer") and text.endswith("Problem: 2 + 1?</><assistant>")
    assert text.count("\\boxed{") == 4 and "\\boxed{8}" in text and "\\boxed{5}" not in text
    assert bare[2].grade("so 2 + 1 = 3", False)[1] == 1.0 and bare[2].grade("so 2 + 1 = 4", False)[1] == 0.0
    assert bare[2].grade("so 2 + 1 = 3", True)[1] == 0.0  # cut off: its last number is no answer
    assert [one.limit for one in mathematics] == [1024] * 5 and mathematics[0].id == "u0"


def test_lookups_are_as_long_as_asked_and_begin_the_answer(folder: Path) -> None:
    from scripts.eval.tasks_data import problems

    args = parsed(folder, "--tasks", "niah_multikey_1", "--lengths", "4000", "--n", "3")
    made = problems(("niah_multikey_1", 4000), args, Letters())
    assert len(made) == 3
    for one in made:
        assert 3700 < len(one.prompt) + one.limit <= 4000 + len("<user></><assistant>")
        text = Letters().decode(one.prompt)
        assert "mentioned in the provided text is" in text.rpartition("<assistant>")[2]
        hidden = re.findall(r" is: (\d{7})\.", text)
        assert len(hidden) == 4 and sum(one.grade(value, False)[1] for value in hidden) == 1.0


def test_a_wave_fits_into_the_pool_with_all_its_samples() -> None:
    from scripts.eval.tasks import waves
    from scripts.eval.tasks_data import Problem

    every = [Problem(str(i), [5] * (10 + i), 10, lambda text, cut: ("", 0.0)) for i in range(20)]
    for samples, wave, pool in ((1, 6, 10_000), (4, 9, 10_000), (2, 100, 100), (1, 100, 10)):
        made = waves(every, samples, wave, pool)
        assert [one for group in made for one in group] == every
        for group in made:
            assert len(group) == 1 or len(group) * samples <= wave
            assert len(group) == 1 or samples * sum(len(one.prompt) + one.limit for one in group) <= pool
    assert [len(group) for group in waves(every, 1, 6, 10_000)] == [6, 6, 6, 2]


class Server:
    """Answers every prompt of GSM8K with its own number, right where ``knows`` says so."""

    def __init__(self, knows: Any) -> None:
        self.knows, self.seeds, self.flushed = knows, [], 0
        self.arm = SimpleNamespace(flush=self._flush)

    def _flush(self) -> None:
        self.flushed += 1

    def _answers(self, prompts: list[list[int]], numbers: list[int]) -> list[Any]:
        from scripts.eval.arms import Answer

        out = []
        for prompt, number in zip(prompts, numbers, strict=True):
            asked = Letters().decode(prompt).rpartition("+ 1?")[0].rpartition("\n")[2].rpartition(" ")
            value = int((asked[2] or asked[0]).strip())
            said = value + 1 if self.knows(value, number) else 99
            out.append(Answer([*Letters()(f"It is {said}").input_ids, END], 0))
        return out

    def greedy(self, prompts: list[list[int]], limits: list[int]) -> list[Any]:
        return self._answers(prompts, [0] * len(prompts))

    def sampled(self, prompts: Any, limits: Any, seeds: list[int], t: float, top_p: float, top_k: int) -> list[Any]:
        assert (t, top_p, top_k) == (0.6, 0.95, 20)
        self.seeds += seeds
        return self._answers(prompts, [at % 4 for at in range(len(prompts))])


def test_the_table_has_what_servers_answered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.eval import tasks

    asked = ("--tasks", "gsm8k", "--shots", "0", "--draws", "500", "--arms", "nvfp4", "nvfp4-everywhere")
    run = run_of(folder, monkeypatch, *asked)
    knows = {
        "bf16": lambda value, number: value != 7,
        "nvfp4-everywhere": lambda value, number: value < 3 or number == 3,
        "nvfp4": lambda value, number: value < 5,
    }
    state = {"version": "1", "precision": {}, "kernel": {"nvfp4": "emulated"}}
    monkeypatch.setattr(tasks, "state_of", lambda arm: state)
    seeds = []
    for name, known in knows.items():
        server = Server(known)
        monkeypatch.setattr(tasks, "Client", lambda arm, top, stops, server=server: server)
        run.measure(SimpleNamespace(), name)
        seeds.append(server.seeds)
        run.measure(SimpleNamespace(), name)  # nothing is asked twice
        assert server.seeds == seeds[-1] and len({*server.seeds}) == 32 and server.flushed == 2
    assert seeds[0] == seeds[1] == seeds[2]
    assert run.waiting() == []
    line = run.report(["bf16", "nvfp4-everywhere", "nvfp4"])
    assert line["emulated"] == ["nvfp4"]
    every = json.loads((folder / "out" / "results.json").read_text())["results"]
    greedy = every["reasoning, greedy"]["all"]["greedy"]
    assert {arm: found[0] for arm, found in greedy["value"].items()} == {
        "bf16": 7 / 8,
        "nvfp4-everywhere": 3 / 8,
        "nvfp4": 5 / 8,
    }
    assert greedy["recovered"]["nvfp4"][0] == pytest.approx(0.5)
    assert greedy["minus"]["nvfp4 - bf16"][0] == pytest.approx(-0.25)
    drawn = every["reasoning, sampled"]["all"]["sampled"]["value"]
    assert drawn["nvfp4-everywhere"][0] == pytest.approx((3 + 5 / 4) / 8)
    text = (folder / "out" / "tables.txt").read_text()
    assert "| nvfp4 | 62.5 [" in text and "emulated: nvfp4" in text
    other = run_of(folder, monkeypatch, "--tasks", "gsm8k", "--shots", "0", "--temperature", "0.7")
    with pytest.raises(SystemExit, match="measured with another temperature"):
        other.waiting()


def test_a_recipe_file_that_changed_is_another_arm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.eval import tasks

    state = {"version": "1", "precision": {}, "kernel": {}}
    monkeypatch.setattr(tasks, "state_of", lambda arm: state)
    monkeypatch.setattr(tasks, "Client", lambda arm, top, stops: Server(lambda value, number: True))
    file = folder / "mine.yaml"
    asked = ("--tasks", "gsm8k", "--shots", "0", "--samples", "0", "--arms", str(file))
    for text, known in (("version: 1\n", False), ("version: 1\nprefill: {precision: fp8}\n", True)):
        file.write_text(text)
        run = run_of(folder, monkeypatch, *asked)
        if known:
            with pytest.raises(SystemExit, match="was measured with another recipe"):
                run.waiting()
        else:
            run.measure(SimpleNamespace(), "mine")
            assert run.waiting() == ["bf16"]


def test_an_edited_package_does_not_mix_with_what_it_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.eval import tasks, text_parts

    assert text_parts.source_digest() == text_parts.source_digest()
    made = []
    for digest in ("a", "b"):
        monkeypatch.setattr(tasks, "source_digest", lambda digest=digest: digest)
        run = run_of(folder, monkeypatch, "--tasks", "gsm8k", "--shots", "0")
        made.append(run.identity_of(("gsm8k", 0), "bf16"))
    assert text_parts.differs(made[0], made[1]) == "source"


def test_a_draw_of_the_best_k_is_the_draw_of_the_same_noise() -> None:
    from scripts.eval.processor import Sample

    torch.manual_seed(0)
    logits = 2 * torch.randn(400, 500)
    every = [
        {"seed": seed, "temperature": 0.6, "top_p": 0.9, "__req__": SimpleNamespace(output_ids=[])}
        for seed in range(400)
    ]
    whole = Sample()(logits, every).argmax(-1)
    assert Sample()(logits, [{**one, "top_k": 500} for one in every]).argmax(-1).equal(whole)
    few = Sample()(logits, [{**one, "top_k": 1 + seed % 5} for seed, one in enumerate(every)]).argmax(-1)
    order = logits.sort(-1, descending=True).indices
    rank = (order == few[:, None]).float().argmax(-1)
    assert all(rank[seed] <= seed % 5 for seed in range(400)) and len({*rank.tolist()}) == 5
    inside = torch.tensor([bool((order[seed, : 1 + seed % 5] == whole[seed]).any()) for seed in range(400)])
    assert few[inside].equal(whole[inside]) and 50 < int(inside.sum()) < 400


def test_wrong_arguments_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, said in (
        (["--n", "0"], "--n: 0 is less than 1"),
        (["--gsm8k-tokens", "0"], "--gsm8k-tokens: 0 is less than 1"),
        (["--data", str(folder / "out")], "has no gsm8k-test.jsonl"),
        (["--model", str(folder / "x")], "has no config.json"),
    ):
        with pytest.raises(SystemExit):
            parsed(folder, *more)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the model has 40000 positions"):
        run_of(folder, monkeypatch, "--tasks", "gsm8k", "--shots", "0", "--gsm8k-tokens", "41000")
    monkeypatch.setattr(Letters, "chat_template", None)
    with pytest.raises(SystemExit, match="has no chat template"):
        run_of(folder, monkeypatch, "--tasks", "gsm8k")


def test_what_is_wrong_with_the_data_ends_the_command_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.eval import tasks

    monkeypatch.setattr(tasks, "main", lambda: run_of(folder, monkeypatch, "--tasks", "gsm8k", "--shots", "0", "5000"))
    monkeypatch.setattr("sys.argv", ["eval_tasks"])
    with pytest.raises(SystemExit, match=r"^eval_tasks: --shots: 5000 of 8 problems leave none to ask$"):
        tasks.command()
    (folder / "gsm8k-test.jsonl").write_text("{")
    with pytest.raises(SystemExit, match=r"^eval_tasks: .*gsm8k-test\.jsonl: cannot be read as jsonl"):
        tasks.command()


def test_collect_reports_the_arms_that_are_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.eval.measuring import measured

    class There:
        def __init__(self, waiting: list[str]) -> None:
            self.args = parsed(folder, "--collect", "--arms", "fp8", "nvfp4")
            self.missing = waiting

        def waiting(self) -> list[str]:
            return self.missing

        def measure(self, arm: Any, name: str) -> None:
            raise AssertionError("nothing is measured")

    assert measured(There([])) == ["bf16", "fp8", "nvfp4"] and capsys.readouterr().err == ""
    assert measured(There(["fp8"])) == ["bf16", "nvfp4"]
    assert "left out: fp8" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="bf16 is not measured in every cell"):
        measured(There(["bf16", "fp8"]))
