from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.host.hooks import registry, table
from mixquant_sglang.recipe.select import Device
from mixquant_sglang.tools.cli import main
from mixquant_sglang.versions import machine


@pytest.fixture(autouse=True)
def without_the_http_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once 0.5.23's is imported among all that pytest has, this process crashes as it ends."""
    monkeypatch.setattr(registry, "HOOKS", tuple(hook for hook in table.HOOKS if hook.process != "http"))


@pytest.mark.slow
def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    command = [sys.executable, "-W", "ignore", "-m", "mixquant_sglang", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    out = done.stdout
    assert done.returncode == 0, done.stderr
    assert f"hooks              {len(registry.hooks_of())} of {len(registry.hooks_of())} targets exist" in out
    assert "plugin             found by SGLang\n" in out and out.endswith(
        "=> --quantization mixquant will start here\n"
    )
    for name in recipe.shipped():
        assert f"recipe {name} " in out


def test_doctor_says_why_a_recipe_is_refused(
    tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this GPU runs native nvfp4")
    path = f"{tmp_path}/native.yaml"
    with open(path, "w") as file:  # noqa: PTH123
        file.write("version: 1\nprefill: {precision: nvfp4}\nkernel: native\n")
    assert main(["doctor", "--recipe", path]) == 1
    out = capsys.readouterr().out
    assert "refused: " in out and "SM100 or newer" in out and out.endswith("will NOT start here\n")
    assert main(["doctor", "--recipe", "nvfp"]) == 1
    assert "refused: unknown recipe 'nvfp'" in (out := capsys.readouterr().out) and "did you mean 'nvfp4'" in out
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert main(["doctor", "--recipe", "bf16"]) == 1
    assert "SGLANG_PLUGINS leaves it out" in capsys.readouterr().out


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe.shipped())
    assert all(len(line.split()) > 3 for line in lines)


def test_doctor_knows_the_min_tokens_of_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes before what a recipe says, so it ends the start of one that decodes low."""
    monkeypatch.setenv(recipe.MIN_TOKENS_ENV, "512")
    assert main(["doctor", "--recipe", "fp8"]) == 0
    assert main(["doctor", "--recipe", "fp8-compact"]) == 1
    assert "shorter passes stay bf16, which needs decode in bf16" in capsys.readouterr().out
    monkeypatch.setenv(recipe.MIN_TOKENS_ENV, "many")
    assert main(["doctor", "--recipe", "fp8"]) == 1
    assert "MIXQUANT_MIN_TOKENS (--mixquant-min-tokens) is 'many'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "text", "says"),
    [
        ("nowhere.yaml", None, "nowhere.yaml: no such file"),
        ("fp9", None, "unknown recipe 'fp9'"),
        ("bad.yaml", "version: 1\nprefil: {}\n", "bad.yaml:2 prefil: unknown key"),
        (
            "short.yaml",
            "version: 1\nprefill: {min_tokens: 9}\ndecode: {precision: nvfp4}\n",
            "shorter passes stay bf16",
        ),
    ],
)
def test_doctor_asks_for_the_recipe_of_the_environment(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    text: str | None,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(asked).write_text(text)
    monkeypatch.setenv(recipe.RECIPE_ENV, asked)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"refused: {says}" in out or f"refused: {tmp_path}/{says}" in out or f"refused: {asked} prefill" in out
    assert says in out and f"asked for          {asked} (MIXQUANT_RECIPE)" in out
    assert out.endswith("will NOT start here\n")
    monkeypatch.setenv(recipe.RECIPE_ENV, "bf16")
    assert main(["doctor"]) == 0


def test_what_was_tested_is_a_version_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = Device("this CPU", None), Device("NVIDIA H200", (9, 0))
    monkeypatch.setattr(machine, "TESTED", {"0.5.17": ("CPU", "GPU"), "0.5.23": ("CPU",)})
    said = {}
    for version in ("0.5.17", "0.5.23", "0.5.24"):
        monkeypatch.setattr(machine, "sglang_version", lambda version=version: version)
        said[version] = [machine.untested(device) for device in (cpu, gpu)]
    assert said["0.5.17"] == ["", ""]
    assert said["0.5.23"] == ["", "SGLang 0.5.23: tested on CPU only; on a GPU, SGLang 0.5.17"]
    assert said["0.5.24"] == [
        "SGLang 0.5.24: not tested; on a CPU, tested with SGLang 0.5.17 and SGLang 0.5.23",
        "SGLang 0.5.24: not tested; on a GPU, tested with SGLang 0.5.17",
    ]
