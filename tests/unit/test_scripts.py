"""The scripts, as far as they can be tried without an environment or a server to make."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import command_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PINS = sorted((SCRIPTS / "pins").glob("sglang-*.txt"))
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}],
    },
    {"role": "tool", "content": "blue"},
]


def test_arms_of_a_benchmark_take_turns() -> None:
    from scripts.bench.servers import in_turn

    arms = ["a", "b", "c", "d"]
    orders = [in_turn(arms, i) for i in range(8)]
    for rounds in (orders[:4], orders[4:]):
        assert all(sorted(place) == arms for place in zip(*rounds, strict=True))
    assert orders[1] == ["b", "c", "d", "a"] and orders[4] == ["d", "c", "b", "a"]


WRAPPERS = sorted(p.name for p in SCRIPTS.iterdir() if p.is_file() and not p.suffix)
COMMANDS: dict[str, str] = runpy.run_path(str(SCRIPTS / "__main__.py"))["COMMANDS"]


@pytest.mark.parametrize("name", [*(f"scripts/{name}" for name in WRAPPERS), ".ci/run"])
def test_shell_scripts_parse_and_have_the_run_bit(name: str) -> None:
    script = ROOT / name
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_each_command_has_a_wrapper_and_python_lies_in_folders() -> None:
    assert sorted([*COMMANDS, "install", "test"]) == WRAPPERS
    assert {p.name for p in SCRIPTS.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {p.name: n for p in SCRIPTS.rglob("*.py") if (n := len(p.read_text().splitlines())) > 350} == {}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_wrapper_runs_its_command_from_anywhere(name: str, tmp_path: Path) -> None:
    """In a copy, whose ``install`` and Python only say how they are called."""
    copy, elsewhere = tmp_path / "checkout" / "scripts", tmp_path / "elsewhere"
    copy.mkdir(parents=True)
    elsewhere.mkdir()
    for file in (name, "env.sh"):
        shutil.copy(SCRIPTS / file, copy)
    python = copy.parent / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    says = 'printf "%s\\n" "$PWD" "$PYTHONSAFEPATH" "$@"'
    for stub, text in ((python, says), (copy / "install", "true")):
        stub.write_text(f"#!/usr/bin/env bash\n{text}\n")
        stub.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("SGLANG", "PYTHONSAFEPATH")}
    command = [copy / name, "--help", "two words"]
    run = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [str(elsewhere), "1", str(copy / "__main__.py"), name, "--help", "two words"]


@pytest.mark.slow
def test_each_command_answers_help_from_anywhere(tmp_path: Path) -> None:
    """As the wrappers start them, but all in one process: most of the time goes into importing torch."""
    code = """
import contextlib, io, runpy, sys
main, *names = sys.argv[1:]
for name in names:
    said = io.StringIO()
    sys.argv = [main, name, "--help"]
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(main, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (name, end.code)
    print(said.getvalue().splitlines()[0])
assert not {"bench", "eval", "models", "public", "tools"} & {*sys.modules}
"""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(SCRIPTS / "__main__.py"), *COMMANDS]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert [line.split()[:2] for line in run.stdout.splitlines()] == [["usage:", name] for name in COMMANDS]


def test_what_is_no_command_is_refused() -> None:
    run = subprocess.run([*command_of("bench"), "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 1 and run.stderr.startswith("usage: ") and "bench_agent" in run.stderr


@pytest.mark.parametrize("pins", PINS, ids=lambda path: path.stem)
def test_pins_are_names_and_versions_only(pins: Path) -> None:
    header, *lines = pins.read_text().splitlines()
    assert re.search(r"Python 3\.\d+ to 3\.\d+\.$", header)  # scripts/install reads the oldest Python from here
    allowed = re.compile(r"[a-z0-9-]+==[a-z0-9.+]+( ; python_version (<|>=) '3\.\d+')?")
    assert [line for line in lines if not allowed.fullmatch(line)] == []
    assert pins.stem.replace("-", "==", 1) in lines
    assert "openai" in {line.partition("==")[0] for line in lines}


@pytest.mark.parametrize("version, folder", [(None, ".venv"), ("0.5.17", ".venv"), ("0.5.23", ".venv-0.5.23")])
def test_env_names_one_environment_per_sglang(version: str | None, folder: str, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "SGLANG"} | (
        {"SGLANG": version} if version else {}
    )
    command = ["bash", "-c", 'source "$1"; echo "$VENV"', "bash", str(SCRIPTS / "env.sh")]
    out = subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == str(ROOT / folder)


@pytest.fixture
def template() -> Any:
    """The chat template of the tiny model, compiled as transformers does it (its tojson does not escape HTML)."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from scripts.models.make_tiny_model import CHAT_TEMPLATE

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    return environment.from_string(CHAT_TEMPLATE)


def test_chat_template_speaks_chatml_with_tools(template: Any) -> None:
    plain = template.render(messages=MESSAGES, add_generation_prompt=True)
    assert plain == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nblue\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tools = template.render(messages=MESSAGES[1:], tools=[{"name": "look"}], add_generation_prompt=False)
    assert tools.startswith("<|im_start|>system\n# Tools\n")
    assert '{"name": "look"}\n</tools>' in tools
    assert tools.endswith("</tool_response><|im_end|>\n")


def test_each_turn_extends_the_prompt_before_it(template: Any) -> None:
    """What the prefix cache of the demo lives on."""
    first = template.render(messages=MESSAGES[:2], add_generation_prompt=True)
    second = template.render(messages=[*MESSAGES[:2], {"role": "assistant", "content": "Sunny."}, MESSAGES[3]])
    assert second.startswith(first + "Sunny.")


def test_make_tiny_model_spares_a_folder_that_is_none_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = subprocess.run([*command_of("make_tiny_model"), tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "no checkpoint" in run.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -- the benchmarks ----------------------------------------------------------------------------------------------------


def event(ids: list[int], completion: int, cached: int = 4) -> bytes:
    """A chunk of /generate as SGLang streams it."""
    meta = {"prompt_tokens": 10, "completion_tokens": completion, "cached_tokens": cached}
    return b"data: " + json.dumps({"output_ids": ids, "meta_info": meta}).encode() + b"\n\n"


def test_a_workload_depends_on_its_seed_only() -> None:
    from scripts.bench.agent import Shape, make_workload, workload_of

    shape = Shape(agents=3, turns=2, system_tokens=7, tool_tokens=(5, 9), output_tokens=(2, 4), vocab=50)
    work = make_workload(shape, "a")
    assert work == make_workload(shape, "a")
    assert work != make_workload(shape, "b")
    assert len({workload_of(shape, 0, *which).system for which in ((0, 1), (1, 1), (0, 8))}) == 3
    assert [len(turns) for turns in work.agents] == [2, 2, 2]
    assert len(json.loads(b"[" + work.system + b"]")) == 7
    for turn in (turn for turns in work.agents for turn in turns):
        tool = json.loads(b"[" + turn.tool + b"]")
        assert len(tool) == turn.tool_tokens and 5 <= len(tool) <= 9 and 2 <= turn.output_tokens <= 4
        assert all(10 <= token < 50 for token in tool)
    assert work.longest(7) == 7 + max(sum(t.tool_tokens + t.output_tokens for t in turns) for turns in work.agents)


@pytest.mark.parametrize("percent, expected", [(0, 1), (50, 2.5), (95, 3.85), (100, 4)])
def test_percentiles_lie_between_ranks(percent: float, expected: float) -> None:
    from scripts.bench.client import percentile

    assert percentile([4, 1, 3, 2], percent) == pytest.approx(expected)
    assert percentile([5.0], percent) == 5


@pytest.mark.parametrize("incremental", [False, True])
def test_a_stream_is_read_whichever_way_it_counts(incremental: bool) -> None:
    from scripts.bench.client import read_stream

    chunks = [event([7], 1), event([8, 9], 3), event([6], 4)]
    if not incremental:
        # The second holds a token that its count does not: the list grew before it was sent.
        chunks = [event([7], 1), event([7, 8, 9], 2), event([7, 8, 9, 6], 4)]
    cut = len(chunks[2]) - 1  # an event counts when its end is there
    reads = [(1.5, chunks[0]), (2.5, chunks[1]), (3.0, chunks[2][:cut]), (3.5, chunks[2][cut:] + b"data: [DONE]\n\n")]
    answer = read_stream(1.0, reads)
    assert answer.ids == [7, 8, 9, 6]
    assert (answer.ttft, answer.latency) == (0.5, 2.5)
    assert answer.gaps == [(1.0, 2), (1.0, 1)]
    assert (answer.prompt_tokens, answer.cached_tokens) == (10, 4)


def test_a_stream_that_is_an_error_says_so() -> None:
    from scripts.bench.client import read_stream

    with pytest.raises(RuntimeError, match="too long"):
        read_stream(0.0, [(1.0, b'data: {"error": {"message": "too long"}}\n\ndata: [DONE]\n\n')])
    with pytest.raises(RuntimeError, match="without a token"):
        read_stream(0.0, [(1.0, b"data: [DONE]\n\n")])


def test_measures_weigh_gaps_by_tokens() -> None:
    from scripts.bench.agent import summarise, table
    from scripts.bench.client import Answer

    answers = [
        Answer([1, 2, 3, 4], 10, 0, ttft=0.1, latency=0.5, gaps=[(0.3, 3)]),
        Answer([1, 2], 30, 20, ttft=0.3, latency=0.8, gaps=[(0.5, 1)]),
    ]
    found = summarise(answers, wall_s=2)
    assert found["ttft_p50_ms"] == pytest.approx(200)
    assert found["itl_mean_ms"] == pytest.approx(200)  # three of 100, one of 500
    assert found["itl_p95_ms"] == pytest.approx(440)
    assert found["latency_p50_ms"] == pytest.approx(650)
    assert found["output_tokens_per_s"] == 3
    assert found["cache_hit_rate"] == 0.5
    faster = {key: value * 2 if "per_s" in key else value / 2 for key, value in found.items()}
    assert table({"one": found, "two": faster}).splitlines()[-1].count("(2.000x)") == 8


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ("--output-tokens 1 4", "--output-tokens"),
        ("--tool-tokens 9 5", "--tool-tokens"),
        ("--turns 0", "--turns"),
        ("--agents 4 --concurrency 8", "cannot fill concurrency 8"),
        ("--kv-tokens 2100", "--kv-tokens"),
        ("--arms fp8 elsewhere/fp8.yaml", "--arms"),
        ("--model nowhere", "config.json"),
    ],
)
def test_bench_agent_refuses_what_it_cannot_measure(
    wrong: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts.bench.agent import parse

    with pytest.raises(SystemExit):
        parse(["--logs", str(tmp_path), *wrong.split()])
    assert reason in capsys.readouterr().err


def test_bench_agent_fills_in_levels(tmp_path: Path) -> None:
    from scripts.bench.agent import parse

    args, shapes = parse(["--logs", str(tmp_path), "--rounds", "1", "--concurrency", "4", "1"])
    assert {n: shape.agents for n, shape in shapes.items()} == {1: 4, 4: 8}
    assert shapes[1].vocab == 150000  # of 151936
    assert (args.model_path / "config.json").is_file()


def test_the_pass_timer_is_found_as_a_plugin_and_writes_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import entry_points
    from types import SimpleNamespace

    import torch

    from scripts.bench import passes as bench_passes
    from scripts.bench.servers import Arm, make_plugin, parse_passes

    monkeypatch.syspath_prepend(make_plugin(tmp_path / "plugin"))
    (entry,) = entry_points(group="sglang.srt.plugins", name="bench_passes")
    assert entry.value == "bench_passes:register"

    file = tmp_path / "passes"
    monkeypatch.setenv(bench_passes.FILE_ENV, str(file))
    monkeypatch.setattr(bench_passes, "_ended", None)

    def forward(runner: str, batch: Any, extra: int) -> int:
        return extra

    for mode, rows in (("EXTEND", 5), ("DECODE", 64), ("MIXED", 3)):
        batch = SimpleNamespace(forward_mode=SimpleNamespace(name=mode), input_ids=torch.zeros(rows))
        assert bench_passes.time_pass(forward, "runner", batch, 7) == 7
    arm = Arm.__new__(Arm)
    arm.passes_file = file
    assert arm.pass_seconds(0, 8) > 0  # waits for the thread that writes
    text = file.read_text()
    assert [(mode, rows) for mode, rows, _ in parse_passes(text)] == [("EXTEND", 5), ("MIXED", 3)]
    assert len(parse_passes(text[:-1])) == 1  # the last line is not there yet


@pytest.mark.slow
def test_measure_formats_gives_the_reasons_for_the_defaults() -> None:
    pytest.importorskip("torch")
    command = [*command_of("measure_formats"), "--tokens", "64", "--outputs", "64"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    errors = json.loads(out[-1])["errors"]
    assert len(errors) == 7 + 2 + 6 and all(len(row) == 5 for row in errors.values())
    default, exact = errors["x: token 2^k, amax/6 (default)"], errors["x: token exact, amax/6"]
    for name in default:
        assert abs(default[name] - exact[name]) < 0.03 * exact[name]  # a power of two costs nothing
        assert errors["w: search"][name] < 0.9 * errors["w: absmax"][name]
        drifted = errors["x: tensor static, calibrated to 1/8 of it"][name]
        assert drifted > 1.2 * default[name]


def test_the_parts_of_all_tests_leave_none_out() -> None:
    """What a part of ``scripts/test`` ignores is a part by itself, and each test file is in one part."""
    text = (ROOT / "scripts" / "test").read_text()
    names = dict(re.findall(r"\b(\w+)=(tests/\S+\.py)\b", text))
    (listed,) = re.findall(r"side_by_side (tests/e2e.*?) -- ", text.replace("\\\n", " "))
    for name, path in names.items():
        listed = listed.replace(f"${name}", path)
    parts = [part.split() for part in shlex.split(listed)]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == 2 and "$" not in listed and {*names.values()} <= {*files}
    for file in files:
        inside = [part for part in parts if file.startswith(part[0]) and f"--ignore={file}" not in part]
        assert len(inside) == 1, (file, inside)
