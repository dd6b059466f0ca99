"""eval_text without servers: its windows, its parts, and its table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.once

pytest.importorskip("torch")

BYTES = 300


class Letters:
    """A tokenizer of single characters, with a chat template that is ChatML's."""

    chat_template: str | None = "chatml"

    def __init__(self, lead: tuple[int, ...] = ()) -> None:
        self.lead = lead

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [1 + ord(letter) % (BYTES - 1) for letter in text]
        return SimpleNamespace(input_ids=[*self.lead, *ids] if add_special_tokens else ids)

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    from scripts.eval.text_data import FILES

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / FILES["essays"][0]).write_text("One thing after another. " * 400)
    rows = [
        {"id": f"a{i}", "involved_classes": ["MathAPI"], "question": [[{"role": "user", "content": f"{i}?"}]] * 2}
        for i in range(9)
    ]
    answers = [{"id": row["id"], "ground_truth": [["add(a=1)", "mean(b=2)"], [f"mul(n={row['id']})"]]} for row in rows]
    tools = [{"_api": "math_api", "name": "add"}, {"_api": "ticket_api", "name": "close"}]
    for name, lines in zip(FILES["bfcl"], (rows, answers, tools), strict=True):
        (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return folder


def test_a_window_is_a_prompt_and_what_follows_it(data: Path) -> None:
    from scripts.eval.text_data import stream, windows

    tokens, starts = stream("essays", data, Letters())
    assert starts is None
    made = windows("essays", data, Letters(lead=(0,)), 5, 300, 40)
    places = []
    for window in made:
        assert len(window.prompt) == 300 and window.prompt[0] == 0 and len(window.answer) == 40
        whole = [*window.prompt[1:], *window.answer]
        places.append(next(at for at in range(299, len(tokens)) if tokens[at - 299 : at + 40] == whole))
    assert made == windows("essays", data, Letters(lead=(0,)), 5, 300, 40)
    with pytest.raises(SystemExit, match="essays is too short for 5000 answers of 40 tokens behind 300"):
        windows("essays", data, Letters(), 5000, 300, 40)


@pytest.mark.parametrize("template", ["chatml", None])
def test_answers_of_conversations_begin_with_the_assistants_turn(data: Path, template: str | None) -> None:
    from scripts.eval.text_data import segments, stream, windows

    tokenizer = Letters()
    tokenizer.chat_template = template
    tokens, starts = stream("bfcl", data, tokenizer)
    assert starts is not None and len(starts) == 18
    opening = "<assistant>" if template else "assistant: "
    own = tokenizer(opening).input_ids
    assert all(tokens[at - len(own) : at] == own for at in starts)
    said = [tokenizer("add(a=1)").input_ids, tokenizer("mul(n=a").input_ids]
    assert [tokens[at : at + len(first)] for at, first in zip(starts, said * 9, strict=False)] == said * 9
    assert all(
        window.answer[:8] == said[0] or window.answer[:7] == said[1]
        for window in windows("bfcl", data, tokenizer, 6, 100, 9)
    )
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    text = "".join(part for part, _ in segments(messages, tokenizer))
    assert text == ("<user>x</><assistant>y</>" if template else "user: x\n\nassistant: y\n\n")


def test_a_template_that_rewrites_what_was_said_is_not_used() -> None:
    from scripts.eval.text_data import segments

    class Forgets(Letters):
        def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
            return f"{len(messages)} messages" + super().apply_chat_template(messages, tokenize, add_generation_prompt)

    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    parts = [*segments(messages, Forgets())]
    assert parts == [("user: a\n\nassistant: ", False), ("b\n\nuser: c\n\n", True)]


# -- parts ---


def part(shift: float, seed: int = 0, **own: Any) -> Any:
    """Of 6 windows and 40 tokens: logits of BF16 and noise of size ``shift``."""
    from scripts.eval.text_parts import Part

    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((6, 40, 12))
    logits = logits + shift * np.random.default_rng(seed + 7).standard_normal(logits.shape)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.broadcast_to(np.arange(12, dtype=np.int32), logits.shape)
    greedy = logprobs.argmax(-1).astype(np.int32)
    identity = {"model": "m", "gpu": "none", "recipe": "bf16", "server": {}, **own}
    return Part(identity, ids, logprobs.astype(np.float32), greedy)


def test_a_part_comes_back_as_it_was(tmp_path: Path) -> None:
    from scripts.eval.text_parts import Part, differs

    made = part(0.3)
    made.save(tmp_path / "x.npz")
    again = Part.load(tmp_path / "x.npz")
    assert again.identity == made.identity and [*tmp_path.iterdir()] == [tmp_path / "x.npz"]
    for name in ("ids", "logprobs", "greedy"):
        assert np.array_equal(getattr(again, name), getattr(made, name))
    assert differs(made.identity, {**made.identity, "server": 1}) == ""
    assert differs(made.identity, {**made.identity, "recipe": "fp8"}) == "recipe"
    assert differs(made.identity, {**made.identity, "gpu": "other"}) == "gpu"
    assert differs({**made.identity, "flags": []}, made.identity) == "flags"


def test_a_table_says_all_that_its_parts_were_measured_with() -> None:
    from scripts.eval.text_parts import measured_with

    def made(gpu: str, version: str, kernel: dict[str, str]) -> Any:
        server = {"version": version, "precision": {}, "kernel": kernel}
        return part(0.0, gpu=gpu, sglang="0.5.17", torch="2.11", server=server)

    every = [made("H200", "", {"fp8": "SGLang's"}), made("H200", "1", {"nvfp4": "native"})]
    every += [made("none", "2", {"nvfp4": "emulated"})]
    assert measured_with(one.identity for one in every) == {
        "gpu": ["H200", "none"],
        "sglang": ["0.5.17"],
        "torch": ["2.11"],
        "mixquant": ["1", "2"],
        "emulated": ["nvfp4"],
    }


def test_figures_are_by_example_and_by_place() -> None:
    from scripts.eval.text_parts import figures

    base = part(0.0)
    own = figures(base, base)
    assert own["kl"] == [0.0] * 6 and own["same"] == [40.0] * 6 and own["identical"] == [1.0] * 6
    near, far = figures(part(0.05), base), figures(part(0.5), base)
    assert list(near) == ["kl", "kl 1", "kl 2-8", "kl 9-32", "kl 33-40", "nll", "same", "identical"]
    assert 0 < np.mean(near["kl"]) < np.mean(far["kl"]) and np.mean(far["same"]) < np.mean(near["same"])
    sizes = np.array([1, 7, 24, 8])
    places = np.array([near[name] for name in ("kl 1", "kl 2-8", "kl 9-32", "kl 33-40")])
    assert (sizes @ places / 40).tolist() == pytest.approx(near["kl"], abs=1e-8)
    true = -base.logprobs[:, :, -1].mean(1)
    assert own["nll"] == pytest.approx(true.tolist(), abs=1e-6)


def test_the_table_has_an_interval_beside_every_figure_and_is_the_same_again() -> None:
    from scripts.eval.statistics import analyse
    from scripts.eval.text_parts import figures
    from scripts.eval.text_report import summary, tables

    arms = {"bf16": 0.0, "nvfp4-everywhere": 0.8, "nvfp4": 0.3, "fp8": 0.05}
    base = {seed: part(0.0, seed) for seed in (1, 2)}
    values = {
        ("essays", seed): {arm: figures(part(shift, seed), base[seed]) for arm, shift in arms.items()} for seed in base
    }
    pairs = [(arm, "bf16") for arm in arms if arm != "bf16"]
    results = [analyse(values, pairs, ("bf16", "nvfp4-everywhere"), 0, 500) for _ in range(2)]
    text = tables(results[0], [*arms])
    assert text == tables(results[1], [*arms])
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in summary(results[0], [*arms]).splitlines()[2:]}
    assert [*rows] == [*arms] and all("[" in cell for row in rows.values() for cell in row[:4])
    back = results[0]["all"]["kl"]["recovered"]
    assert 0.5 < back["nvfp4"][0] < back["fp8"][0] <= 1 and set(back) == {"nvfp4", "fp8"}
    nll, mean = results[0]["all"]["nll"]["value"]["fp8"], rows["fp8"][2]
    assert mean.startswith(f"{math.exp(nll[0]):.2f}" if math.exp(nll[2]) >= 10 else f"{math.exp(nll[0]):.4f}")


# -- the command ---


def test_what_cannot_be_measured_is_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.eval.text import ARMS, parse

    model = tmp_path / "model"
    model.mkdir()
    base = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out")]

    def refused(*more: str) -> str:
        with pytest.raises(SystemExit):
            parse([*base, *more])
        return capsys.readouterr().err

    assert "has no config.json" in refused()
    (model / "config.json").write_text("{}")
    args = parse(base)
    assert args.sources == ["essays", "code", "bfcl"] and args.arms == [*ARMS]
    assert parse([*base, "--arms", "fp8"]).arms == ["bf16", "fp8"]
    assert "has no tau2-airline-tasks.json, which tau2 needs" in refused("--sources", "tau2")
    assert "must fit into the KV pool" in refused("--kv-tokens", "8000")
    assert "--n: 0 is less than 1" in refused("--n", "0")
    assert "nvfp5 is no recipe file and none of bf16" in refused("--arms", "nvfp5")
    for more in ((), ("--redraw",)):
        assert "argument --price: unknown GPU 'A100'; known: " in refused("--price", "H200", "A100", *more)


def test_sources_without_their_files_are_said_or_refused(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.eval.text import parse

    (tmp_path / "config.json").write_text("{}")
    base = ["--model", str(tmp_path), "--out", str(tmp_path / "out")]
    assert parse([*base, "--data", str(data)]).sources == ["essays", "code", "bfcl"]
    said = f"sources that are left out, for want of a file: tau2 ({data}: tau2-airline-tasks.json)\n"
    assert capsys.readouterr().err == said
    assert parse(base).sources == ["code"]
    said = capsys.readouterr().err
    assert all(f"{source} (no --data: " in said for source in ("essays", "bfcl", "tau2"))
    assert parse([*base, "--sources", "code"]).sources == ["code"] and capsys.readouterr().err == ""
    (tmp_path / "empty").mkdir()
    for name, more, what in (
        ("nope", (), "nope is no folder"),
        ("nope", ("--multi-turn",), "nope is no folder"),
        ("config.json", ("--sources", "code"), "config.json is no folder"),
        ("empty", (), "empty has the files of no source: it lacks paul-graham-essays.txt, "),
        ("empty", ("--multi-turn",), "empty has no bfcl-v4-multi-turn-base-60.jsonl, which bfcl needs"),
    ):
        with pytest.raises(SystemExit):
            parse([*base, "--data", str(tmp_path / name), *more])
        assert what in capsys.readouterr().err


def test_a_file_of_a_source_that_cannot_be_read_is_named(data: Path) -> None:
    from scripts.eval.text_data import FILES, stream
    from scripts.public.server import Stop

    (data / FILES["bfcl"][1]).write_text('{"id": ')
    with pytest.raises(Stop, match=rf"{FILES['bfcl'][1]}: cannot be read as jsonl"):
        stream("bfcl", data, Letters())


def test_every_arm_is_a_recipe_or_sglangs_own(tmp_path: Path) -> None:
    from mixquant_sglang import recipe
    from scripts.eval.measuring import ARMS, VARIANTS

    special = {"stock-fp8", *VARIANTS}
    assert {recipe.load(arm).name for arm in ARMS if arm not in special} == {*ARMS} - special
    made = {}
    for name, text in VARIANTS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        made[name] = recipe.load(str(tmp_path / f"{name}.yaml"))
    assert not made["nvfp4-unprotected"].protect_last_prompt_token and made["nvfp4-absmax"].scales == "absmax"


class FakeArm:
    """Answers /generate as a server of ``vocab`` tokens whose every token is the last one's successor."""

    name, log = "fake", Path("/dev/null")

    def __init__(self) -> None:
        self.flushed = self.asked = 0

    def flush(self) -> None:
        self.flushed += 1

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        from scripts.eval.processor import LIFT, SHIFT

        self.asked += 1
        out = []
        for prompt, params in zip(body["input_ids"], body["sampling_params"], strict=True):
            assert params["ignore_eos"] and params["max_new_tokens"] == 8
            forced = params.get("custom_params")
            meta: dict[str, Any] = {"finish_reason": {"type": "length"}, "cached_tokens": 0}
            ids = [(prompt[-1] + 1 + i) % BYTES for i in range(8)]
            if forced:
                ids = forced["replay"]
                spare = forced["spare"]
                others = [(-3.0 - n - SHIFT, n, None) for n in range(BYTES) if n != spare]
                most = body["top_logprobs_num"] - 2
                meta["output_top_logprobs"] = [
                    [(0.0, token, None), (LIFT - SHIFT - 2, spare, None), *[o for o in others if o[1] != token][:most]]
                    for token in ids
                ]
            out.append({"output_ids": ids, "meta_info": meta})
        return json.dumps(out).encode()


def test_an_arm_is_measured_once_and_collected_anywhere(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoTokenizer

    from scripts.eval import measuring, text

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: Letters())
    config = SimpleNamespace(vocab_size=BYTES, max_position_embeddings=4096)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda _: SimpleNamespace(get_text_config=lambda: config))
    state = {"version": "0", "precision": {}, "kernel": {"nvfp4": "emulated"}}
    monkeypatch.setattr(text, "state_of", lambda _: state)
    served = {}

    def measure(run: Any, waiting: list[str]) -> None:
        for name in waiting:
            served[name] = FakeArm()
            run.measure(served[name], name)

    monkeypatch.setattr(measuring, "measure", measure)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    base = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--n", "5", "--wave", "2"]
    base += ["--sources", "essays", "bfcl", "--lengths", "64", "--answer-tokens", "8", "--top", "9", "--draws", "200"]
    with pytest.raises(SystemExit, match="bf16 is not measured in every cell"):
        text.main([*base, "--collect"])
    text.main([*base, "--arms", "nvfp4"])
    assert {*served} == {"bf16", "nvfp4"} and all(arm.flushed == arm.asked == 12 for arm in served.values())
    first = capsys.readouterr().out
    served.clear()
    text.main([*base, "--arms", "nvfp4"])
    assert not served and capsys.readouterr().out == first and "emulated: nvfp4" in first
    monkeypatch.setattr(text, "machine", lambda: {"gpu": "another", "sglang": "9", "torch": "9"})
    text.main([*base, "--collect"])
    said = capsys.readouterr()
    assert said.out == first and "left out: nvfp4-everywhere, stock-fp8, " in said.err
    with pytest.raises(SystemExit, match="was measured with another sglang"):
        text.main([*base, "--arms", "nvfp4"])
    with pytest.raises(SystemExit, match="was measured with another top"):
        text.main([*base, "--collect", "--top", "5"])


def test_the_spare_token_is_in_no_answer() -> None:
    from scripts.eval.text import spare_token

    assert spare_token(10, [[8, 3], [9]]) == 7


def test_a_recipe_file_is_an_arm_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from scripts.eval.measuring import ARMS, VARIANTS, arms_of

    parser = argparse.ArgumentParser()
    mine, other = tmp_path / "mine.yaml", tmp_path / "nvfp4.yaml"
    for file in (mine, other):
        file.write_text("version: 1\nprefill: {precision: fp8}\n")
    names, recipes = arms_of(parser, ["fp8", str(mine), "bf16", "nvfp4-absmax", "fp8"])
    assert names == ["bf16", "fp8", "mine", "nvfp4-absmax"]
    assert recipes == {**VARIANTS, "mine": mine.read_text()} and {*VARIANTS} < {*ARMS}
    for asked, said in ((str(tmp_path / "no.yaml"), "is no recipe file and none of bf16"), (str(other), "rename")):
        with pytest.raises(SystemExit):
            arms_of(parser, [asked])
        assert said in capsys.readouterr().err


def test_speeds_are_the_planners_and_a_refused_arm_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.eval.text_speed import speed_table, speeds

    slower = "version: 1\nprefill: {precision: fp8}\nlayers:\n- {match: 're:.*qkv_proj', prefill: bf16}\n"
    few = slower.replace("re:.*qkv_proj", r"re:model\.layers\.(3|7)\.self_attn\.qkv_proj$")
    recipes = {"slower": slower, "few": few, "other": "x"}
    fast = speeds(["bf16", "fp8", "nvfp4-compact", "slower", "few"], recipes, ["B200", "H200"])
    assert fast["H200"]["few"] is None  # layers of another model
    assert fast["H200"]["bf16"] == 1.0 and fast["H200"]["fp8"] > fast["H200"]["slower"] > 1.2
    assert fast["B200"]["nvfp4-compact"] is None and fast["H200"]["nvfp4-compact"] is not None
    assert "nvfp4-compact on B200" in capsys.readouterr().err
    results = {"all": {"kl": {"recovered": {"fp8": [0.9, 0.8, 0.95], "slower": None}}}}
    rows = {line.split(" | ")[0]: line for line in speed_table(results, fast).splitlines()[2:]}
    assert rows["| fp8"].startswith("| fp8 | 90.0% [80.0, 95.0] | 1.45x | 1.68x")
    assert "nothing to recover" in rows["| slower"] and "| none |" in rows["| nvfp4-compact"]


def test_a_finished_run_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.eval.text import main

    out = ["--out", str(tmp_path), "--redraw", "--arms", "fp8", "--price", "H200"]
    with pytest.raises(SystemExit, match="is not there"):
        main(out)
    measures = {
        name: {"value": {"bf16": [0.0] * 3, "fp8": [0.1, 0.05, 0.2]}, "recovered": {"fp8": [0.9, 0.8, 0.95]}}
        for name in ("kl", "kl 1", "kl 2-8")
    }
    full = {"head": "of a model", "arms": ["bf16", "fp8", "nvfp4"], "results": {"all": measures}}
    for measure in measures.values():
        measure["value"]["nvfp4"] = [0.5, 0.4, 0.6]
    (tmp_path / "results.json").write_text(json.dumps(full))
    main(out)
    said = capsys.readouterr().out
    assert "| fp8 | 90.0% [80.0, 95.0] | 1.68x |" in said and "nvfp4" not in said
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn in ({"text.png", "speed.png"}, set())  # without matplotlib there is nothing to draw with
    del full["head"]
    (tmp_path / "results.json").write_text(json.dumps(full))
    with pytest.raises(SystemExit, match="older eval_text"):
        main(out)
