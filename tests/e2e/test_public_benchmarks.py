"""The public benchmarks as a user runs them: small made files, a real server, the tiny model.

Its answers are noise, so this is about the machinery: requests that SGLang takes, lengths, records, resume, summaries.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import command_of
from tests.support.server import Server
from tests.support.servers import LOW_RECIPE, Servers

pytestmark = [pytest.mark.once, pytest.mark.server, pytest.mark.timeout(2400)]

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def server(servers: Servers) -> Server:
    return servers.low


def call(name: str, server: Server, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    command = [*command_of(f"eval_{name}"), "--base-url", server.url, "--out", out, *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def run(name: str, server: Server, out: Path, *more: object) -> tuple[str, dict[str, Any]]:
    done = call(name, server, out, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def test_reasoning(server: Server, tmp_path: Path) -> None:
    gsm8k = [{"question": f"{n} and {n}?", "answer": f"Add them.\n#### {2 * n}"} for n in (1, 2, 3)]
    aime = [{"id": n, "problem": f"What is {n}?", "answer": f"0{n}"} for n in (60, 61)]
    data = (write(tmp_path / "gsm8k.json", gsm8k), write(tmp_path / "aime.json", aime))
    command = ("--datasets", "gsm8k", "aime24", "--data", *data, "--max-tokens", 8, "--seeds", 1, 2)
    text, last = run("reasoning", server, tmp_path, *command)
    assert last["server"]["mixquant"]["recipe"] == LOW_RECIPE
    assert f"mixquant {LOW_RECIPE} (prefill " in text
    assert last["results"]["gsm8k"]["groups"]["all"]["samples"] == 6
    made = records(tmp_path / "gsm8k.jsonl")
    assert [r["answer"] for r in made if r["seed"] == 1] and all(1 <= r["output_tokens"] <= 8 for r in made)

    # Cut short, then once more: only what is missing is asked.
    low = server.state()["tokens"]["prefill"]
    file = tmp_path / "aime24.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    again, _ = run("reasoning", server, tmp_path, *command)
    assert len(records(file)) == 4 and again.splitlines()[1] == text.splitlines()[1]
    asked = sum(server.state()["tokens"]["prefill"].values()) - sum(low.values())
    assert 0 < asked <= records(file)[-1]["prompt_tokens"]

    wrong = call("reasoning", server, tmp_path, *command, "--model", "other")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.startswith("eval_reasoning: --model other: not served by ") and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize("prompt", ["direct", "cot"])
def test_longbench_v2(server: Server, tmp_path: Path, prompt: str) -> None:
    row = {"question": "Which?", "answer": "B", "difficulty": "hard", **{f"choice_{c}": f"it is {c}" for c in "ABCD"}}
    rows = [{**row, "_id": "long", "context": "A line of text. " * 300}, {**row, "_id": "short", "context": "Text."}]
    command = ("--data", write(tmp_path / "data.json", rows), "--prompt", prompt, "--max-context", 400)
    _, last = run("longbench_v2", server, tmp_path, *command, "--max-tokens", 8)
    assert last["results"]["longbench_v2"]["groups"]["hard"]["examples"] == 2
    prompts = {r["id"]: r["prompt_tokens"] for r in records(tmp_path / "longbench_v2.jsonl")}
    assert 395 <= prompts["long"] <= 430 and prompts["short"] < 200


def test_longmemeval(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "I like tea."}, {"role": "assistant", "content": "Noted."}]
    history = {"haystack_dates": ["2023/05/20 (Sat) 02:21"], "haystack_sessions": [turns]}
    row = {"question": "Tea?", "answer": "yes", "question_date": "2023/06/01 (Thu) 10:00", **history}
    kinds = {"q1": "single-session-user", "q2_abs": "multi-session", "q3": "temporal-reasoning"}
    rows = [{**row, "question_id": name, "question_type": kind} for name, kind in kinds.items()]
    judge = ("--judge-base-url", server.url, "--judge-model", tiny_model)
    command = ("--data", write(tmp_path / "data.json", rows), "--max-tokens", 8, *judge)
    text, last = run("longmemeval", server, tmp_path, *command)
    assert last["results"]["longmemeval"]["groups"].keys() == {
        "all", "single-session-user", "abstention", "temporal-reasoning"
    }  # fmt: skip
    assert "| Qwen3-8B | 57.00 | 49.82 | 54.85 |" in text
    made = records(tmp_path / "longmemeval.jsonl")
    assert len(made) == 3 and all(isinstance(r["verdict"], str) and r["correct"] in (True, False) for r in made)


def test_ruler(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    """The lengths that the server counts, template included, are what was asked for, and a little less."""
    command = ("--tasks", "niah_single_1", "niah_multikey_2", "vt", "fwe", "--lengths", 1024, "--limit", 2)
    _, last = run("ruler", server, tmp_path, *command)
    assert last["results"]["ruler-1024"]["groups"]["vt"]["samples"] == 2
    answers = {"vt": 30, "fwe": 50}
    for record in records(tmp_path / "ruler-1024.jsonl"):
        assert 800 < record["prompt_tokens"] + answers.get(record["groups"][0], 128) <= 1024, record["id"]
    # A local tokenizer makes the same prompts, so nothing is asked again.
    more = ("--tasks", "vt", "--lengths", 1024, "--limit", 2, "--tokenizer", tiny_model)
    _, again = run("ruler", server, tmp_path, *more)
    assert again["results"]["ruler-1024"]["groups"]["vt"] == last["results"]["ruler-1024"]["groups"]["vt"]
    assert len(records(tmp_path / "ruler-1024.jsonl")) == 8
