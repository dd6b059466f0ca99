"""The scripts, as far as they can be tried without an environment or a server to make."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize(
    "name", ["scripts/install", "scripts/demo", "scripts/test", "scripts/make_tiny_model", ".ci/run"]
)
def test_shell_scripts_parse_and_have_the_run_bit(name: str) -> None:
    script = ROOT / name
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


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
def template(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The chat template of the tiny model, compiled as transformers does it (its tojson does not escape HTML)."""
    monkeypatch.syspath_prepend(SCRIPTS)
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from make_tiny_model import CHAT_TEMPLATE

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
    run = subprocess.run(
        [sys.executable, SCRIPTS / "make_tiny_model.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "no checkpoint" in run.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
