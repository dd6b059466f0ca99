"""The trained tiny model: its tasks, its tokens, its plain-torch forward pass, and that training learns and resumes."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.once

TASKS = ("find", "hops", "order", "agent", "quote")
LINES = [f"return self.member_{i % 7}(argument_{i}, other[{i * 37 % 101}])" for i in range(400)]
SHAPE = {"vocab_size": 700, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scripts.models.training_data import prepare

    out = tmp_path_factory.mktemp("tiny") / "data"
    prepare(out, vocab=SHAPE["vocab_size"], most=12)
    return out


def run(data: Path, out: Path, *flags: str) -> int:
    from scripts.models.train_tiny_model import main

    small = ["--shape", json.dumps(SHAPE), "--batch-tokens", "1024", "--longest", "256", "--ramp", "1"]
    small += ["--warmup", "5", "--workers", "0", "--n", "0", "--state", f"{out}.pt"]
    return main([str(data), str(out), *small, *flags])


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "trained"
    assert run(data, out, "--steps", "30") == 0
    return out


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_examples_depend_on_their_arguments_only(task: str) -> None:
    from scripts.models.tiny_tasks import examples

    made = examples(task, "eval", 3, 7, lines=LINES)
    assert made == examples(task, "eval", 3, 7, lines=LINES)
    assert made[:2] == examples(task, "eval", 2, 7, lines=LINES)
    prompts = {(example.messages[0]["content"], example.answer) for example in made}
    for split, seed in (("train", 7), ("eval", 8)):
        others = {(e.messages[0]["content"], e.answer) for e in examples(task, split, 3, seed, lines=LINES)}
        assert prompts.isdisjoint(others)


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_is_correct_and_another_is_not(task: str) -> None:
    from scripts.models.tiny_tasks import correct, examples

    first, second = examples(task, "eval", 2, lines=LINES)
    assert correct(task, first.answer, first.answer)
    assert correct(task, f"{first.answer}\n", first.answer)
    for wrong in ("", second.answer, first.answer[:-1] if task == "quote" else first.answer + "1"):
        assert not correct(task, wrong, first.answer)


def test_what_is_not_there_is_refused() -> None:
    from scripts.models.tiny_tasks import examples

    with pytest.raises(ValueError, match="allowed are find, hops"):
        examples("sort", "eval", 1)
    with pytest.raises(ValueError, match="allowed are 0 to 2"):
        examples("find", "eval", 1, level=3, lines=LINES)


@pytest.mark.parametrize("level", range(3))
def test_find_has_each_key_once_and_near_ones(level: int) -> None:
    from scripts.models.tiny_tasks import LEVELS, examples

    (example,) = examples("find", "eval", 1, level=level, lines=LINES)
    records, question = example.messages[0]["content"].split("\n\n")
    keys = [record.partition("=")[0] for record in records.splitlines()]
    assert len(set(keys)) == len(keys) > 100
    assert example.answer in records.splitlines()
    assert question == f"Value of {example.answer.partition('=')[0]}?"
    near = sum(any(sum(a != b for a, b in zip(k, o, strict=True)) == 1 for o in keys) for k in keys) / len(keys)
    assert near >= LEVELS["find"][level]["near"]


@pytest.mark.parametrize("level", range(3))
def test_find_crowds_the_asked_key(level: int) -> None:
    from scripts.models.tiny_tasks import LENGTHS, LEVELS, examples

    for length in LENGTHS:
        (example,) = examples("find", "eval", 1, level=level, length=length, lines=LINES)
        asked = example.answer.partition("=")[0]
        keys = [record.partition("=")[0] for record in example.messages[0]["content"].split("\n\n")[0].splitlines()]
        changed = [sum(a != b for a, b in zip(key, asked, strict=True)) for key in keys]
        assert changed.count(0) == 1
        share = (changed.count(1) + changed.count(2)) / (len(keys) - 1)
        crowd = LEVELS["find"][level].get("crowd")
        assert share < 0.3 if crowd is None else crowd - 0.01 < share < crowd + 0.15


def test_hops_follow_the_graph() -> None:
    from scripts.models.tiny_tasks import LEVELS, examples

    (example,) = examples("hops", "eval", 1, level=2, lines=LINES)
    graph, question = example.messages[0]["content"].split("\n\n")
    edges = dict(line.split(">") for line in graph.splitlines())
    start, path = re.fullmatch("From ([0-9]+) by (.*)", question).groups()  # type: ignore[union-attr]
    at, steps = start, example.answer.splitlines()
    assert len(steps) == LEVELS["hops"][2]["hops"]
    for step, door in zip(steps, path.split(), strict=True):
        number, _, label = door.partition(":")
        assert step == f"{number}:{at}.{label}>{edges[f'{at}.{label}']}"
        at = edges[f"{at}.{label}"]


def test_orders_add_up_with_every_carry_written() -> None:
    from scripts.models.tiny_tasks import examples

    for example in examples("order", "eval", 20, level=2, lines=LINES):
        prices, question = example.messages[0]["content"].split("\n\n")
        price = {key: int(value) for key, value in (line.split("=") for line in prices.splitlines())}
        total = 0
        for asked, step in zip(question.split()[2:], example.answer.splitlines(), strict=True):
            sign, key = re.fullmatch("[0-9]+:([+-])([0-9]+)", asked).groups()  # type: ignore[union-attr]
            total = (total + (price[key] if sign == "+" else -price[key])) % 100000
            head, work, after = step.split(" ")
            assert head == f"{asked}={price[key]:04d}"
            assert after == f"{total:05d}"
            digits = ""
            for part in work.split(","):
                a, b, carry, result = re.fullmatch(r"(.)[+-](.)[+-](.)=(..)", part).groups()  # type: ignore[union-attr]
                value = int(a) + int(b) + int(carry) if sign == "+" else int(a) - int(b) - int(carry)
                assert value % 10 == int(result[1]) and int(result[0]) == (value > 9 or value < 0)
                digits = result[1] + digits
            assert digits == after


def test_an_agent_is_answered_by_pages_that_depend_on_its_calls() -> None:
    from scripts.models.tiny_tasks import call, examples

    (example,) = examples("agent", "eval", 1, level=0, lines=LINES)
    calls = 0
    for turn, result in itertools.pairwise(example.turns):
        if turn["role"] == "assistant":
            assert example.reply(turn["content"], calls) == result["content"]
            calls += 1
    assert calls == example.max_calls == 4
    assert example.reply(example.answer, calls) is None
    right, wrong = example.reply(call("1234"), 0), example.reply(call("1235"), 0)
    assert right and wrong and right.splitlines()[1:] != wrong.splitlines()[1:]
    assert right.splitlines()[0] == "page 1234, 1 of 4"


@pytest.mark.slow
def test_the_agents_system_message_is_what_the_template_makes_of_its_tool(data: Path) -> None:
    from transformers import AutoTokenizer

    from scripts.models.tiny_tasks import SYSTEM, TOOL

    library = AutoTokenizer.from_pretrained(data / "tokenizer")
    user = [{"role": "user", "content": "x"}]
    with_tool = library.apply_chat_template(user, tools=[TOOL], tokenize=False)
    assert library.apply_chat_template([{"role": "system", "content": SYSTEM}, *user], tokenize=False) == with_tool


def test_quotes_name_a_version_that_differs_from_the_others() -> None:
    from scripts.models.tiny_tasks import LEVELS, examples

    for example in examples("quote", "eval", 5, level=0, lines=LINES):
        versions = example.messages[0]["content"].split("\n\n")[:-1]
        assert len(versions) == LEVELS["quote"][0]["versions"]
        assert sum(example.answer in version for version in versions) == 1
        assert len(example.answer.splitlines()) == LEVELS["quote"][0]["lines"]


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_plain_python_tokens_are_the_librarys(data: Path) -> None:
    from transformers import AutoTokenizer

    from scripts.models.tiny_tasks import examples
    from scripts.models.tiny_text import Tokenizer, stdlib_files

    library = AutoTokenizer.from_pretrained(data / "tokenizer")
    ours = Tokenizer(data / "tokenizer" / "tokenizer.json")
    texts = list(stdlib_files("eval", 4).values())
    texts += ["a  12\n\n 3\t<|im_end|>\n x", "it's\n\n", "", " 7"]
    texts += [examples(task, "eval", 1, lines=LINES)[0].messages[0]["content"] for task in TASKS]
    for text in texts:
        ids = ours.encode(text)
        assert ids == library.encode(text)
        assert ours.decode(ids) == text.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="ASCII"):
        ours.encode("caf\u00e9")


@pytest.mark.parametrize("task", TASKS)
def test_segments_are_what_the_chat_template_renders(task: str, data: Path) -> None:
    from transformers import AutoTokenizer

    from scripts.models.tiny_tasks import segments, training_example
    from scripts.models.tiny_text import Tokenizer

    library = AutoTokenizer.from_pretrained(data / "tokenizer")
    ours = Tokenizer(data / "tokenizer" / "tokenizer.json")
    for seed in range(5):
        example = training_example(task, random.Random(seed), 700, LINES)
        messages = [*example.messages, *example.turns]
        for turns, rendered in ((True, messages), (False, example.messages)):
            parts = segments(example, turns)
            text = library.apply_chat_template(rendered, tokenize=False, add_generation_prompt=not turns)
            assert "".join(part for part, _ in parts) == text
            assert [token for part, _ in parts for token in ours.encode(part)] == library.encode(text)
        learnt = [part for part, learns in segments(example) if learns]
        assert learnt == [f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert example.answer + "<|im_end|>" in learnt


# -- batches and schedule ----------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_seed_and_step(data: Path) -> None:
    from scripts.models.training_data import KINDS, SHARES, Data

    source = Data(data)
    one, same, other = (source.batch(1, step, 4096, 512) for step in (3, 3, 4))
    assert (one.tokens == same.tokens).all() and (one.weights == same.weights).all() and one.lengths == same.lengths
    assert len(other.lengths) != len(one.lengths) or (other.tokens != one.tokens).any()
    for batch in (one, other):
        assert len(batch.tokens) == sum(batch.lengths) == 4096
        present = {KINDS[kind] for kind in batch.kinds}
        assert batch.weights.sum() == pytest.approx(sum(SHARES[name] for name in present), rel=1e-4)
        ends = list(itertools.accumulate(batch.lengths))
        assert all(batch.weights[end - 1] == 0 for end in ends)  # nothing predicts another document's first token
    assert sum(SHARES.values()) == pytest.approx(1)


def test_rates_and_lengths_by_step() -> None:
    from scripts.models.training import rate_at
    from scripts.models.training_data import limit_at

    assert [limit_at(step, 100, 8192) for step in (0, 10, 25, 50, 99, 100)] == [512, 1024, 2048, 4096, 4096, 8192]
    assert limit_at(99, 100, 700) == 700
    assert rate_at(0, 10, None, None) == pytest.approx(0.1)
    assert [rate_at(step, 10, 50, 100) for step in (20, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])


def test_muon_makes_singular_values_alike() -> None:
    from scripts.models.optimizer import orthogonalised

    torch.manual_seed(0)
    for size in ((3, 40, 24), (2, 24, 40)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(size)))
        assert values.min() > 0.5 and values.max() < 1.4


# -- model -------------------------------------------------------------------------------------------------------------


def test_the_default_shape_fits_what_is_shipped(tmp_path: Path) -> None:
    from scripts.models.checkpoint import SHARD_BYTES, read_checkpoint, write_checkpoint
    from scripts.models.tiny_model import Shape, initial

    shape = Shape()
    assert all(k % 64 == 0 for k in (shape.hidden_size, shape.intermediate_size, shape.q_size))
    weights = initial(shape, 0)
    write_checkpoint(tmp_path, shape, weights, 0, 2)
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert sum(sizes) < 23_500_000 and max(sizes) <= SHARD_BYTES + 100_000
    again, read = read_checkpoint(tmp_path)
    assert again == shape
    assert all(torch.equal(read[name], weight.bfloat16()) for name, weight in weights.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own
def test_transformers_computes_the_same(trained: Path, data: Path) -> None:
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from scripts.models.checkpoint import read_checkpoint
    from scripts.models.tiny_model import Model, generate

    shape, weights = read_checkpoint(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer.encode("def look(self, key):\n    return self.table[key] + 12345\n" * 4)
    other = [5, 9, 30, 7]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        reference = Qwen3ForCausalLM.from_pretrained(trained, dtype=dtype)
        model = Model(shape, {name: weight.to(dtype) for name, weight in weights.items()})
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0]
            found = model.logits(model.packed(torch.tensor(other + ids), [len(other), len(ids)]))[len(other) :]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        if dtype == torch.float32:
            generated = reference.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
            )[0, len(ids) :].tolist()
            found = generate(model, [other, ids], 12, stop=2)[1]
            assert found == (generated[: generated.index(2)] if 2 in generated else generated)


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_learns(trained: Path) -> None:
    log = json.loads((trained / "training.json").read_text())
    assert log[0]["step"] == 1 and log[-2]["step"] == 30
    assert log[-2]["text"] < log[0]["text"] - 0.5
    assert log[-1]["schedule"] == {"decay_from": 21, "steps": 30}


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "resumed"
    assert run(data, out, "--steps", "30", "--minutes", "0") == 3  # the time is over after one step
    assert torch.load(f"{out}.pt")["step"] == 1
    with pytest.raises(SystemExit, match="the same flags"):
        run(data, out, "--steps", "30", "--resume", "--seed", "5")
    assert run(data, out, "--steps", "30", "--resume") == 0
    for name in ("model-00001-of-00001.safetensors", "config.json"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.slow
def test_a_run_without_steps_fits_its_schedule_into_the_time(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "timed"
    assert run(data, out, "--minutes", "0.06") in (0, 3)  # 3: a busy machine left no time for the decay
    assert (out / "model.safetensors.index.json").exists()


def test_resume_needs_a_state(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(data, tmp_path / "none", "--resume")
    assert "--resume needs the file" in capsys.readouterr().err


def test_a_model_that_is_always_right_gets_all_points(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.models import evaluation
    from scripts.models.checkpoint import read_checkpoint
    from scripts.models.tiny_model import Model
    from scripts.models.tiny_tasks import examples, segments

    source = evaluation.Data(data, "eval")
    encode, right = source.tokenizer.encode, {}
    for task in TASKS:
        for example in examples(task, "eval", 3, level=1, length=512, lines=source.lines):
            before = "".join(text for text, _ in segments(example, turns=False))
            for turn in example.turns if example.page else example.turns[:1]:
                if turn["role"] == "assistant":
                    right[tuple(encode(before))] = turn["content"]
                    before += f"{turn['content']}<|im_end|>\n"
                else:
                    before += f"<|im_start|>user\n<tool_response>\n{turn['content']}\n</tool_response><|im_end|>\n"
                    before += "<|im_start|>assistant\n"

    def oracle(model: Model, prompts: list[list[int]], max_new: int, stop: int, **arm: Any) -> list[list[int]]:
        answers = [encode(right[tuple(prompt)]) for prompt in prompts]
        assert max(map(len, answers)) < max_new
        return answers

    monkeypatch.setattr(evaluation, "generate", oracle)
    model = Model(*read_checkpoint(trained))
    for task in TASKS:
        assert evaluation.accuracy(model, source, task, 1, 512, 3, {}) == 1.0


@pytest.mark.parametrize("task", ["find", "agent"])
def test_every_arm_is_measured(task: str, trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.models.train_tiny_model import main

    flags = ["--evaluate", "--arms", "bf16", "nvfp4", "mixed", "--tasks", task, "--levels", "0", "--lengths", "512"]
    assert main([str(data), str(trained), *flags, "--n", "2"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rows[0]["task"] == "text" and rows[0]["bf16"] != rows[0]["nvfp4"]
    assert rows[1] == {"task": task, "level": 0, "length": 512, "n": 2} | dict.fromkeys(("bf16", "nvfp4", "mixed"), 0.0)
