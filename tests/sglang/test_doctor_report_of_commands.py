"""``mixquant doctor --report COMMAND`` describes the server that the command would start, not this shell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixquant_sglang.host.hooks import launcher
from mixquant_sglang.tools import launch, report


def test_the_recipe_is_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its assignments, and by its flags, those of a file too; as a server would have it, whatever is set here."""
    monkeypatch.setattr(launch, "ends", lambda _: [])
    (tmp_path / "c.yaml").write_text("mixquant_recipe: nvfp4\nmixquant-min-tokens: 9\n")
    python = ["python", "-m", "sglang.launch_server"]
    set_here = {"MIXQUANT_RECIPE": "nvfp4-fp8", "MIXQUANT_MIN_TOKENS": "3", "SGLANG_A": "1"}
    by_words = ["MIXQUANT_RECIPE=bf16", "MIXQUANT_MIN_TOKENS=7", "SGLANG_B=2", *python]
    by_file = [*python, "--config", str(tmp_path / "c.yaml")]

    def made(wanted: str | None, words: list[str]) -> tuple[str, str, set[str]]:
        lines, _ = report.made(wanted, words, set_here)
        (line,) = [line for line in lines if line.startswith("recipe: ")]
        found = re.fullmatch(r"recipe: (\S+) \(.*min_tokens (\w+).*\)", line)
        assert found is not None
        return found[1], found[2], {line for line in lines if line.startswith("environment: ")}

    name, tokens, variables = made(None, [*by_words, "--mixquant-recipe", "fp8"])
    assert (name, tokens) == ("fp8", "7")
    assert variables == {
        *("environment: MIXQUANT_RECIPE=fp8", "environment: MIXQUANT_MIN_TOKENS=7"),
        *("environment: SGLANG_A=1", "environment: SGLANG_B=2"),
    }
    assert made(None, by_words)[:2] == ("bf16", "7") == made(None, [" ".join(by_words)])[:2]
    assert made(None, by_file)[:2] == ("nvfp4", "9")
    assert made(None, [*by_file, "--mixquant-rec=fp8", "--mixquant-min", "auto"])[:2] == ("fp8", "auto")
    assert made("fp8", by_words)[0] == "fp8" and made("fp8", by_file)[0] == "nvfp4"
    assert made(None, [])[:2] == made(None, python)[:2] == ("nvfp4-fp8", "3") and made("fp8", [])[0] == "fp8"
    assert launch.FLAGS == launcher.FLAGS


def test_flags_are_those_behind_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's ``-m`` is none, nor are a container's."""
    monkeypatch.setattr(launch, "ends", lambda _: [])
    docker = ["docker", "run", "-e", "A=b", "--gpus", "all", "zq", "python3", "-m", "sglang.launch_server"]
    for words in (["python", "-m", "sglang.launch_server"], docker, ["sglang", "serve"]):
        lines, _ = report.made(None, [*words, "--device", "cpu"], {})
        assert [line for line in lines if line.startswith(("flag: ", "note: "))] == [
            *("flag: --device cpu", "note: the command has no --quantization mixquant: asked with it"),
        ]
