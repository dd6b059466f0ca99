from __future__ import annotations

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.cli import main
from mixquant_sglang.hooks import table


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"hooks              {len(table.wanted())} of {len(table.wanted())} targets exist" in out
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
    assert "did you mean 'nvfp4'" in capsys.readouterr().err
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert main(["doctor", "--recipe", "bf16"]) == 1
    assert "SGLANG_PLUGINS leaves it out" in capsys.readouterr().out


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe.shipped())
    assert all(len(line.split()) > 3 for line in lines)
