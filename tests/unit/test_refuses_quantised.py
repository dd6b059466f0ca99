"""``sensitivity`` and ``quantize`` take BF16 checkpoints alone, and say so before they read weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from mixquant_sglang.tools import cli
from tests.support.quantised_checkpoints import CONFIGS, WRITERS
from tests.unit.test_sensitivity import data, write_model

__all__ = ["data"]  # a fixture


@pytest.mark.once
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantised_checkpoint_is_refused_in_one_line(
    kind: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixquant_sglang.tools.sensitivity import kl

    model = write_model(tmp_path / "model", layers=1)
    loaded, made = load_file(model / "model.safetensors"), {}
    for name, tensor in loaded.items():
        if "_proj.weight" in name:
            made |= WRITERS[kind](name.removesuffix(".weight"), tensor)[0]
        else:
            made[name] = tensor
    save_file({n: t.contiguous() for n, t in made.items()}, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    monkeypatch.setattr(kl, "load_model", None)
    capsys.readouterr()  # transformers shows what it writes
    asked = ["sensitivity", str(model), "--data", str(data), "--gpu", "B200", "--priced-as", "Qwen3-8B"]
    for said in ({"quantization_config": CONFIGS[kind]}, {}):  # without: the names of its tensors say it
        (model / "config.json").write_text(json.dumps(config | said))
        for command in (asked, ["quantize", str(model), str(tmp_path / "out")]):
            assert cli.main(command) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert "is quantised already (" in line and line.endswith("; give its BF16 original")
