"""eval_accuracy without servers: what its logit processors do, what it makes of answers, and its statistics."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.once

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
LINES = [f"value_{i} = compute_{i}(first, second)" for i in range(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of single bytes and a config; no weights."""
    from scripts.models.tiny_text import SPECIAL, _byte_letters

    folder = tmp_path_factory.mktemp("model")
    vocab = {token: i for i, token in enumerate([*SPECIAL, *_byte_letters().values()])}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 16384, "num_hidden_layers": 8}))
    return folder


def params(steps: list[int], **more: Any) -> list[dict[str, Any]]:
    """What SGLang gives a processor: custom_params with the request."""
    return [{**more, "__req__": SimpleNamespace(output_ids=[7] * step)} for step in steps]


# -- in the server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [5, 40, 63])
def test_replay_forces_a_token_and_its_distribution_comes_back(token: int) -> None:
    from scripts.eval.processor import SPARE, Replay, distribution

    logits = 6 * torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    logits[1, token] = logits[1].max() + 9
    expected = torch.log_softmax(logits.double(), dim=-1)
    out = Replay()(logits.clone(), params([2, 2], replay=[1, 2, token, 3]))
    assert out.argmax(-1).tolist() == [token] * 2
    values, places = torch.log_softmax(out, dim=-1).topk(12)
    for row in range(2):
        found = list(zip(values[row].tolist(), places[row].tolist(), [None] * 12, strict=True))
        ids, logprobs = distribution(found, token)
        assert len(ids) == 11 and ids[-1] == token and SPARE not in ids
        assert logprobs == pytest.approx(expected[row, ids].tolist(), abs=1e-5)
        others = expected[row].clone()
        others[[SPARE, token]] = -torch.inf
        assert ids[:-1] == others.topk(10).indices.tolist()


def test_samples_depend_on_seed_and_step_and_follow_the_distribution() -> None:
    from scripts.eval.processor import Sample

    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    more = {"temperature": 0.6, "top_p": 0.9}
    n = 20000
    every = [{"seed": seed, **more, "__req__": SimpleNamespace(output_ids=[])} for seed in range(n)]
    logits = p.log().expand(n, 4).clone()
    drawn = Sample()(logits, every).argmax(-1)
    assert drawn.equal(Sample()(logits, every).argmax(-1))
    kept = p[:2] ** (1 / 0.6)  # 0.902 of the mass: the third token starts beyond top_p
    sharp = torch.cat((kept, torch.zeros(2)))
    share = torch.bincount(drawn, minlength=4) / n
    assert torch.allclose(share, sharp / sharp.sum(), atol=0.015)
    flat = torch.zeros(1, 2048)
    by_step = [Sample()(flat, params([step], seed=3, temperature=1.0, top_p=1.0)).argmax().item() for step in range(40)]
    assert len({*by_step}) > 30
    shifted = flat + 1e-7 * torch.randn(1, 2048)
    again = [Sample()(shifted, params([s], seed=3, temperature=1.0, top_p=1.0)).argmax().item() for s in range(40)]
    assert sum(a == b for a, b in zip(by_step, again, strict=True)) > 35  # the noise belongs to the token, not its rank


@pytest.mark.slow
def test_a_server_finds_the_processor_by_its_module_alone() -> None:
    from scripts.eval.processor import Replay, to_str
    from scripts.eval.run import processor_on_path

    code = "import json, pickle, sys; print(pickle.loads(bytes.fromhex(json.loads(sys.argv[1])['callable'])).__name__)"
    code += "; print(sorted(name for name in sys.modules if name.startswith('scripts')))"
    with processor_on_path():
        command = [sys.executable, "-c", code, to_str(Replay)]
        out = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    modules = ["scripts", "scripts.eval", "scripts.eval.processor"]
    assert (out.stdout.splitlines(), out.stderr) == (["Replay", str(modules)], "")


# -- arms --------------------------------------------------------------------------------------------------------------


def test_the_recipes_are_what_the_arms_are_called(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    from mixquant_sglang.recipe import load
    from mixquant_sglang.recipe.matching import RuleMatcher
    from mixquant_sglang.recipe.modules import FUSED
    from mixquant_sglang.tools.plan.models import find_model
    from scripts.eval.arms import ABLATIONS, RECIPES, write_recipes

    found = {Path(file).stem: load(file) for file in write_recipes(tmp_path, list(RECIPES), layers=8)}
    shipped = {"mix": "nvfp4", "mix-fp8": "fp8", "everywhere": "nvfp4-everywhere", "bf16": "bf16"}
    for name, recipe in found.items():
        assert (recipe.prefill, recipe.decode, recipe.protect_last_prompt_token) == RECIPES[name]
        if name in shipped:
            same = load(shipped[name])
            assert (recipe.prefill, recipe.decode, recipe.kernel) == (same.prefill, same.decode, same.kernel)
            assert (recipe.protect_last_prompt_token, recipe.scales) == (same.protect_last_prompt_token, same.scales)
    (file,) = write_recipes(tmp_path, ["attention-fp8"], layers=8)
    arm, same = load(file), load("nvfp4-fp8")
    assert replace(arm, name="", source="", layers=(), description="") == replace(
        same, name="", source="", layers=(), description=""
    )
    matchers = [RuleMatcher(recipe.layers, FUSED) for recipe in (arm, same)]
    model = find_model("Qwen3-8B")
    shapes = model.blocks[0].matrices(model.hidden, 1)
    for name in (f"model.layers.{i}.{shape.name}" for i in (0, 7) for shape in shapes):
        expected = ("fp8" if "self_attn" in name else "nvfp4", "bf16")
        assert [m.precisions(name, arm.prefill, arm.decode) for m in matchers] == [expected] * 2
    names = ["mix", *ABLATIONS]
    different = {name: load(file) for name, file in zip(names, write_recipes(tmp_path, names, layers=8), strict=True)}
    facts = {
        (r.prefill, r.decode, r.protected_tail, r.min_tokens, r.scales, tuple((x.match, x.prefill) for x in r.layers))
        for r in different.values()
    }
    assert len(facts) == len(names) and all(r.decode == "bf16" for r in different.values())
    assert re.search(different["edges-bf16"].layers[0].match.removeprefix("re:"), "model.layers.7.mlp.down_proj")


class FakeArm:
    """A server that knows the reference, and says something else for problems in ``wrong``; keeps what it was asked."""

    def __init__(self, every: list[Any], wrong: set[int] = frozenset(), cached: int | None = None) -> None:  # type: ignore[assignment]
        self.name, self.flushes, self.asked, self.cached = "fake", 0, [], cached
        self.knows: dict[tuple[int, ...], list[int]] = {}
        for problem in every:
            prompt = list(problem.prompt)
            for turn, said in enumerate(problem.said):
                answer = [*said[:-2], said[-2] ^ 1, said[-1]] if problem.number in wrong else said
                self.knows[tuple(prompt)] = answer
                if turn < len(problem.heard):
                    prompt += [*said, *problem.heard[turn]]
        self.wrong = {tuple(problem.prompt) for problem in every if problem.number in wrong}

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        assert path == "/generate"
        self.asked.append(body)
        out = []
        for prompt, sampling in zip(body["input_ids"], body["sampling_params"], strict=True):
            assert sampling["temperature"] == 0  # samples are drawn by the processor
            meta: dict[str, Any] = {"finish_reason": {"type": "stop"}}
            meta["cached_tokens"] = len(prompt) if self.cached is None else self.cached
            ids = self.knows[tuple(prompt)]
            if replay := sampling.get("custom_params", {}).get("replay"):
                ids, own = replay, -2.0 if tuple(prompt) in self.wrong else -0.1
                meta["output_top_logprobs"] = [
                    [[0.0, token, None], [own + 31 - 48, 0, None], [-3.0 - 48, 1 + (token == 1), None]] for token in ids
                ]
            out.append({"output_ids": ids, "meta_info": meta})
        return json.dumps(out).encode()

    def flush(self) -> None:
        self.flushes += 1

    def failed(self, what: str) -> SystemExit:
        return SystemExit(f"{self.name} {what}")


def made(model: Path, task: str, n: int = 3) -> tuple[list[Any], Any]:
    from scripts.eval.cells import problems, text_problems
    from scripts.models.tiny_tasks import examples
    from scripts.models.tiny_text import Tokenizer

    tokenizer = Tokenizer(model / "tokenizer.json")
    if task == "text":
        corpus = [token for line in LINES * 4 for token in (*tokenizer.encode(line), 0)]
        return text_problems(corpus, n, 400, 4), tokenizer
    return problems(examples(task, "eval", n, level=0, length=400, lines=LINES), tokenizer), tokenizer


def settings(**more: Any) -> Any:
    from scripts.eval.cells import Settings

    fixed = {"samples": 2, "temperature": 0.6, "top_p": 0.95, "answer_tokens": 4096, "seed": 0, "kv_tokens": 10**6}
    return Settings(**{**fixed, "wave": 100, **more})


@pytest.mark.parametrize("task", ["find", "agent", "quote"])
def test_a_problem_is_the_rendered_conversation_in_tokens(task: str, model: Path) -> None:
    from scripts.models.tiny_tasks import segments

    every, tokenizer = made(model, task)
    for problem in every:
        tokens = [*problem.prompt, *problem.said[0]]
        for heard, said in zip(problem.heard, problem.said[1:], strict=True):
            tokens += [*heard, *said]
        assert [*tokens, *tokenizer.encode("\n")] == tokenizer.encode(
            "".join(text for text, _ in segments(problem.example))
        )
        assert len(tokens) <= problem.room
        assert 0 not in tokens  # the place that Replay borrows


@pytest.mark.parametrize("task", ["find", "agent"])
def test_conversations_become_figures(task: str, model: Path) -> None:
    from scripts.eval.arms import Client
    from scripts.eval.cells import figures, measure

    every, tokenizer = made(model, task)
    good, bad = FakeArm(every), FakeArm(every, wrong={1})
    reference = measure(Client(good, 2), every, settings(), tokenizer)  # type: ignore[arg-type]
    raw = measure(Client(bad, 2), every, settings(), tokenizer)  # type: ignore[arg-type]
    same, found = figures(reference, reference), figures(raw, reference)
    turns = len(every[0].said)
    assert same["accuracy"] == same["sampled"] == same["identical"] == [1, 1, 1]
    assert same["kl"] == [0, 0, 0] and same["nll"] == pytest.approx([0.1] * 3)
    assert same["same"] == same["tokens"] == [sum(map(len, problem.said)) for problem in every]
    assert found["identical"] == [1, 0, 1] and found["same"][1] == len(every[1].said[0]) - 2
    assert found["kl"][0] == found["kl"][2] == 0 < found["kl"][1]
    assert len(found["by_turn"]["kl"]) == turns
    if task == "find":
        assert found["accuracy"] == found["sampled"] == [1, 0, 1] and found["nll"] == pytest.approx([0.1, 2.0, 0.1])
    seeds = [
        p["custom_params"]["seed"]
        for body in good.asked
        for p in body["sampling_params"]
        if "seed" in p.get("custom_params", {})
    ]
    assert len({*seeds}) == len(seeds) == 3 * 2 * turns
    assert good.flushes == 1 and len(good.asked) == 3 * turns


def test_text_is_held_out_windows_that_do_not_share_answers(model: Path) -> None:
    from scripts.eval.arms import Client
    from scripts.eval.cells import figures, measure, text_problems

    corpus = [0 if i % 50 == 0 else 3 + i for i in range(3000)]
    windows = text_problems(corpus, 8, 400, 20)
    at = [corpus.index(window.said[0][0]) for window in windows]
    assert at == sorted(at) and min(b - a for a, b in pairwise(at)) >= 20
    for start, window in zip(at, windows, strict=True):
        assert window.prompt == corpus[start - 400 : start] and window.said == [corpus[start : start + 20]]
        assert 0 not in window.said[0]
    with pytest.raises(SystemExit, match="too short for 200 answers"):
        text_problems(corpus, 200, 400, 20)

    every, tokenizer = made(model, "text")
    arm = FakeArm(every, wrong={2})
    raw = measure(Client(arm, 2), every, settings(), tokenizer)  # type: ignore[arg-type]
    found = figures(raw, raw, settings())
    assert len(arm.asked) == 2  # no samples
    assert found["accuracy"] == [1, 1, 1]  # -2 is more than the other token's -3
    assert found["sampled"] == pytest.approx([1, 1, np.exp(-2 / 0.6) / (np.exp(-2 / 0.6) + np.exp(-3 / 0.6))])


def test_the_probability_of_a_draw() -> None:
    from scripts.eval.statistics import drawn_probability

    logp = np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.3, 0.5, 0.2]]))
    assert drawn_probability(logp, 1.0, 1.0) == pytest.approx([0.2, 0.5, 0.2])
    assert drawn_probability(logp, 1.0, 0.75) == pytest.approx([0, 0.5 / 0.8, 0])
    assert drawn_probability(logp, 0.5, 1.0) == pytest.approx([0.04 / 0.38, 0.25 / 0.38, 0.04 / 0.38])


def test_the_cache_is_flushed_between_turns_or_must_be_there(model: Path) -> None:
    from scripts.eval.arms import Client
    from scripts.eval.cells import measure

    every, tokenizer = made(model, "agent")
    turns = len(every[0].said)
    arm = FakeArm(every, cached=0)
    measure(Client(arm, 2), every, settings(), tokenizer, flushed=True)  # type: ignore[arg-type]
    assert arm.flushes == 1 + 3 * turns
    with pytest.raises(SystemExit, match="more --kv-tokens"):
        measure(Client(arm, 2), every, settings(), tokenizer)  # type: ignore[arg-type]


def test_groups_fit_into_the_pool(model: Path) -> None:
    from scripts.eval.cells import groups

    every, _ = made(model, "find", 7)
    assert [len(group) for group in groups(every, settings(wave=3))] == [3, 3, 1]
    room = len(every[0].prompt) + 3 * (every[0].room - len(every[0].prompt))
    assert [len(group) for group in groups(every, settings(kv_tokens=int(2.5 * room)))] == [2, 2, 2, 1]


def test_a_server_that_fails_ends_in_a_line(model: Path) -> None:
    from scripts.eval.arms import Client

    every, _ = made(model, "find", 1)
    arm = FakeArm(every)
    answers = arm.post
    client = Client(arm, 2)  # type: ignore[arg-type]

    def dead(path: str, body: Any) -> bytes:
        raise ConnectionRefusedError("refused")

    arm.post = dead  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match=r"fake did not answer \(ConnectionRefusedError"):
        client.greedy([every[0].prompt], [9])
    arm.post = lambda path, body: answers(path, body).replace(b'"stop"', b'"abort"')  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match="aborted a request"):
        client.greedy([every[0].prompt], [9])
    arm.post = lambda path, body: answers(path, body).replace(b'"output_ids": [', b'"output_ids": [9, ')  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match="did not replay"):
        client.replayed([every[0].prompt], [every[0].said[0]])


# -- statistics --------------------------------------------------------------------------------------------------------


def test_divergence_is_exact_over_all_tokens_and_a_bound_over_some() -> None:
    from scripts.eval.statistics import divergence

    generator = torch.Generator().manual_seed(0)
    p, q = torch.log_softmax(2 * torch.randn(2, 5, 40, generator=generator, dtype=torch.float64), dim=-1)
    exact = (p.exp() * (p - q)).sum(-1).numpy()
    shuffled = torch.randperm(40, generator=generator)
    ids = np.tile(np.arange(40), (5, 1))
    found = divergence(ids, p.numpy(), np.tile(shuffled.numpy(), (5, 1)), q[:, shuffled].numpy())
    assert found == pytest.approx(exact, abs=1e-6)
    (top_p, ids_p), (top_q, ids_q) = p.topk(12), q.topk(12)
    bound = divergence(ids_p.numpy(), top_p.numpy(), ids_q.numpy(), top_q.numpy())
    assert (bound <= exact + 1e-9).all() and (bound > 0).all()
    assert (divergence(ids_p.numpy(), top_p.numpy(), ids_p.numpy(), top_p.numpy()) == 0).all()


@pytest.mark.parametrize("tokens, expected", [([1, 2, 3], 3), ([1, 2], 2), ([1, 9, 3], 1), ([], 0), ([1, 2, 3, 4], 3)])
def test_agreement_counts_up_to_the_first_difference(tokens: list[int], expected: int) -> None:
    from scripts.eval.statistics import agreement

    assert agreement(tokens, [1, 2, 3]) == expected


def cells_of(n: int = 400) -> Any:
    """Three arms over two tasks: `mix` loses a tenth of what `everywhere` loses; examples differ more than arms."""
    rng = np.random.default_rng(5)
    cells = {}
    for task in ("find", "hops"):
        base = rng.normal(size=n)
        noise = [0.1 * rng.normal(size=n) for _ in range(2)]
        arms = {"bf16": base, "everywhere": base - 1 + noise[0], "mix": base - 0.1 + noise[1]}
        cells[task, 2048] = {arm: {"m": v.tolist(), "flat": [1.0] * n} for arm, v in arms.items()}
    return cells


def test_intervals_are_paired_and_repeat() -> None:
    from scripts.eval.statistics import analyse

    arguments = (cells_of(), [("everywhere", "bf16"), ("mix", "bf16")], ("bf16", "everywhere"), 0, 2000)
    results = analyse(*arguments)
    assert results == analyse(*arguments)
    assert list(results) == ["find 2048", "hops 2048", "find", "hops", "all"]
    assert results["all"]["examples"] == 800 and results["find"]["m"] == results["find 2048"]["m"]
    for group in results.values():
        value, low, high = group["m"]["minus"]["everywhere - bf16"]
        assert low < value < high and abs(value + 1) < 0.03 and high - low < 0.04
        _, low, high = group["m"]["value"]["bf16"]
        assert high - low > 0.1  # unpaired, the same figure would be lost
        share, low, high = group["m"]["recovered"]["mix"]
        assert low < share < high and abs(share - 0.9) < 0.02 and high - low < 0.05
        assert group["flat"]["recovered"]["mix"] is None


def test_a_report_shows_every_figure_with_its_interval(tmp_path: Path) -> None:
    from scripts.eval.cells import MEASURES
    from scripts.eval.report import TITLES, plot, tables
    from scripts.eval.statistics import analyse

    assert tuple(TITLES) == MEASURES
    cells = {key: {arm: dict.fromkeys(MEASURES, v["m"]) for arm, v in row.items()} for key, row in cells_of(20).items()}
    results = analyse(cells, [("mix", "bf16")], ("bf16", "everywhere"), 0, 200)
    text = tables(results)
    assert text.count("[95% interval]") == 3 * len(MEASURES) and "mix - bf16" in text
    pytest.importorskip("matplotlib")
    assert plot(results, tmp_path / "a.png", "title") and (tmp_path / "a.png").stat().st_size > 10000


# -- command -----------------------------------------------------------------------------------------------------------


def test_the_wrapper_parses_and_has_the_run_bit() -> None:
    assert os.access(SCRIPTS / "eval_accuracy", os.X_OK)
    subprocess.run(["bash", "-n", SCRIPTS / "eval_accuracy"], check=True)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("--model nowhere", "no config.json"),
        ("--n 0", "--n: 0 is less than 1"),
        ("--top-p 1.5", "--top-p"),
        ("--arms everywhere nvfp5", "nvfp5"),
        ("--multi-turn --tasks find", "--multi-turn"),
        ("--data nowhere", "eval.txt.gz"),
        ("--ablation --multi-turn", "--ablation"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    wrong: str, reason: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.eval.accuracy import parse

    with pytest.raises(SystemExit):
        parse(["--model", str(model), "--out", str(tmp_path), *wrong.split()])
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("vocab, reason", [({"a": 0}, "'<|endoftext|>' in its place"), (None, "cannot be read")])
def test_a_tokenizer_that_lacks_tokens_is_refused(
    vocab: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.eval.accuracy import parse

    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64, "num_hidden_layers": 1}')
    if vocab:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": []}}))
    with pytest.raises(SystemExit):
        parse(["--model", str(tmp_path), "--out", str(tmp_path)])
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_the_defaults_leave_nothing_out(model: Path, tmp_path: Path) -> None:
    from scripts.eval.accuracy import parse
    from scripts.eval.arms import ABLATIONS, MAIN
    from scripts.models.tiny_tasks import LENGTHS, TASKS

    args, cells = parse(["--model", str(model), "--out", str(tmp_path), "--arms", "mix"])
    assert args.arms == ["bf16", "mix"]
    args, cells = parse(["--model", str(model), "--out", str(tmp_path)])
    assert args.n * len(LENGTHS) >= 500 and args.samples == 4 and args.arms == list(MAIN)
    tasks = (*TASKS, "text")
    assert [(cell.task, cell.length) for cell in cells] == [(task, length) for task in tasks for length in LENGTHS]
    args, _ = parse(["--model", str(model), "--out", str(tmp_path), "--ablation"])
    assert {"bf16", "everywhere", "mix", *ABLATIONS} <= {*args.arms} and args.samples == 0
    _, cells = parse(["--model", str(model), "--out", str(tmp_path), "--multi-turn"])
    assert {(cell.task, cell.level) for cell in cells} == {("agent", 1)}


def test_an_ablation_shows_quality_beside_speed() -> None:
    from scripts.eval.ablation import speeds, tradeoff
    from scripts.eval.arms import ABLATIONS

    arms = ["bf16", "everywhere", "mix", *ABLATIONS]
    fast = speeds(arms)
    assert fast["bf16"] == 1 < fast["down-bf16"] < fast["mix"] <= fast["everywhere"]
    value = {arm: [0.25, 0.125, 0.5] for arm in arms}
    one = {"value": value, "minus": {f"{arm} - bf16": [0.0] * 3 for arm in arms[1:]}}
    lines = tradeoff({"all": dict.fromkeys(("first", "kl", "accuracy"), one)}, fast).splitlines()
    assert len(lines) == 2 + len(arms) and all("0.2500 [0.1250, 0.5000]" in line for line in lines[2:])
    assert lines[4].split()[0] == "mix" and lines[4].endswith(f"{fast['mix']:.2f}x")


def test_a_signal_stops_the_servers_and_waits_for_no_answer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.eval import accuracy as eval_accuracy
    from scripts.eval import run as eval_run

    stopped, heard = threading.Event(), []

    @contextlib.contextmanager
    def serving(args: Any, timed: bool) -> Iterator[list[Any]]:
        try:
            yield [SimpleNamespace(name=name) for name in args.arms]
        finally:
            stopped.set()

    def asked(self: Any, arm: Any, *_: Any) -> Any:
        if Path(arm.name).stem == "bf16":
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append(stopped.wait(1))
        raise SystemExit("did not answer")  # as of a server that is gone

    monkeypatch.setattr(eval_accuracy, "serving", serving)
    monkeypatch.setattr(eval_run, "default_lines", lambda split: LINES)
    monkeypatch.setattr(eval_run, "state_of", lambda arm: {})
    monkeypatch.setattr(eval_run.Run, "_measure_arm", asked)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            eval_accuracy.main(
                ["--model", str(model), "--out", str(tmp_path), "--tasks", "find", "--lengths", "400", "--n", "1"]
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard and all(heard), "threads wait for answers while the servers go on"


@pytest.mark.slow
@pytest.mark.parametrize("multi_turn", [False, True])
def test_a_run_is_reported_from_its_files_and_goes_on(
    multi_turn: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.eval import accuracy as eval_accuracy
    from scripts.eval import run as eval_run
    from scripts.eval.accuracy import parse
    from scripts.eval.run import Run

    monkeypatch.setattr(eval_run, "default_lines", lambda split: LINES)
    monkeypatch.setattr(
        eval_run, "state_of", lambda arm: {"version": "0", "precision": {}, "kernel": {"nvfp4": "emulated"}}
    )
    command = ["--model", str(model), "--out", str(tmp_path), "--arms", "everywhere", "mix", "--lengths", "400", "600"]
    command += [
        "--n",
        "4",
        "--level",
        "0",
        "--draws",
        "200",
        *(["--multi-turn"] if multi_turn else ["--tasks", "find"]),
    ]
    args, cells = parse(command)
    run = Run(args, cells)
    assert run.waiting() == cells
    every = [problem for cell in cells for problem in run.problems_of(cell)]

    def up(*names: str) -> list[Any]:
        arms = []
        for name in names:
            arm = FakeArm(every, wrong={1, 2} if name == "everywhere" else set())
            arm.name = f"{name}.yaml"
            arms.append(arm)
        return arms

    with ThreadPoolExecutor(1) as pool:
        run.measure(pool, up("bf16"), cells)  # as with --at-once 1
        run.measure(pool, up("everywhere"), cells)
        assert Run(args, cells).waiting() == cells
        run.measure(pool, up("mix"), cells)
    eval_accuracy.main(command)  # all is there: no server starts
    first = capsys.readouterr().out
    eval_accuracy.main(command)
    assert capsys.readouterr().out == first
    facts = json.loads(first.splitlines()[-1])
    assert facts["emulated"] == ["nvfp4"]
    assert all((tmp_path / name).is_file() for name in ("results.json", "tables.txt"))
    if multi_turn:
        assert facts["all"]["kl"]["minus"]["mix/flushed - mix/kept"] == [0, 0, 0]
    else:
        assert facts["all"]["accuracy"]["value"]["everywhere"][0] == 0.5
        assert facts["all"]["accuracy"]["value"]["mix"] == [1, 1, 1]
    with pytest.raises(SystemExit, match="another n"):
        eval_accuracy.main([*command, "--n", "5"])
    monkeypatch.setattr(eval_run, "machine", lambda: {"gpu": "x", "sglang": "0", "torch": "0", "commit": "c"})
    with pytest.raises(SystemExit, match="another gpu"):
        eval_accuracy.main(command)
    eval_accuracy.main([*command, "--n", "5", "--report"])  # with what the files say
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == {**facts, "commit": "unknown"}
    with pytest.raises(SystemExit, match=r"find at 500|agent at 500"):
        eval_accuracy.main([*command, "--lengths", "400", "500", "--report"])
    monkeypatch.undo()
    monkeypatch.setattr(eval_run, "default_lines", lambda split: LINES)
    monkeypatch.setattr(eval_run, "source_digest", lambda: "another")
    with pytest.raises(SystemExit, match="another source"):
        eval_accuracy.main(command)
    file = min((tmp_path / "cells").iterdir())
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(SystemExit, match=rf"{file.name} cannot be read, .*: copy it again, or remove it and measure"):
        eval_accuracy.main([*command, "--report"])


def test_what_a_server_says_of_itself_has_its_fp8_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    from typing import cast

    from scripts.eval import run as eval_run
    from scripts.eval.measuring import Arm

    said: dict[str, Any] = {"version": "0", "precision": {}, "kernel": {}, "tokens": {}}
    answers = ({"internal_states": [{"mixquant": state}]} for state in (said, said | {"fp8_gemms": {"48 x 32": {}}}))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(json.dumps(next(answers)).encode()))
    arm = cast("Arm", SimpleNamespace(url="http://here"))
    assert eval_run.state_of(arm) == {"version": "0", "precision": {}, "kernel": {}}
    assert eval_run.state_of(arm) == {"version": "0", "precision": {}, "kernel": {}, "fp8_gemms": {"48 x 32": {}}}
