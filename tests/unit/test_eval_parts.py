"""What eval_text, eval_tasks and eval_accuracy have measured, and whether it is taken for what is asked now."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.test_eval_tasks import Server, folder, run_of

pytestmark = pytest.mark.once

pytest.importorskip("torch")

__all__ = ["folder"]  # a fixture

GSM8K = ("--tasks", "gsm8k", "--shots", "0", "--samples", "0", "--draws", "200")
CELL = ("gsm8k", 0)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped recipes, where they may be edited."""
    from mixquant_sglang import recipe

    own = tmp_path / "configs"
    own.mkdir()
    files = {name: own / file.name for name, file in recipe.shipped().items()}
    for name, file in recipe.shipped().items():
        files[name].write_bytes(file.read_bytes())
    monkeypatch.setattr(recipe, "shipped", lambda: files)
    return own


@pytest.fixture
def measured(folder: Path, recipes: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of eval_tasks in which bf16, nvfp4-everywhere and fp8 were measured; called, the same command again."""
    from scripts.eval import tasks

    state = {"version": "1", "precision": {}, "kernel": {}}
    monkeypatch.setattr(tasks, "state_of", lambda arm: state)
    monkeypatch.setattr(tasks, "Client", lambda arm, top, stops: Server(lambda value, number: True))
    arms = ("--arms", "nvfp4-everywhere", "fp8")

    def again(*more: str) -> Any:
        return run_of(folder, monkeypatch, *GSM8K, *arms, *more)

    run = again()
    for arm in run.args.arms:
        run.measure(object(), arm)
    assert again().waiting() == []
    return again


def rewritten(run: Any, arm: str, **own: Any) -> None:
    """The part of ``arm`` with another identity; None: without the field."""
    file = run.file(CELL, arm)
    part = json.loads(gzip.decompress(file.read_bytes()))
    part["identity"] = {k: v for k, v in {**part["identity"], **own}.items() if v is not None}
    file.write_bytes(gzip.compress(json.dumps(part).encode()))


def test_a_shipped_recipe_that_was_edited_is_measured_again(recipes: Path, measured: Any) -> None:
    (recipes / "fp8.yaml").write_bytes((recipes / "nvfp4-everywhere.yaml").read_bytes())
    for more in ((), ("--collect",)):
        with pytest.raises(SystemExit, match=r"gsm8k-0-fp8\.json\.gz was measured with another recipe than fp8 is now"):
            measured(*more).waiting()


def test_a_comment_or_a_description_is_no_other_recipe(recipes: Path, measured: Any) -> None:
    text = (recipes / "fp8.yaml").read_text()
    assert "description: FP8 prefill" in text
    (recipes / "fp8.yaml").write_text("# Another comment.\n" + text.replace("FP8 prefill", "Prefill in FP8"))
    assert measured().waiting() == []


def test_a_part_of_an_older_version_is_collected_and_said(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arm in ("bf16", "nvfp4-everywhere", "fp8"):
        rewritten(measured(), arm, recipe=arm, source=None)
    with pytest.raises(SystemExit, match="was measured with another source"):
        measured().waiting()
    run = measured("--collect")
    assert run.waiting() == []
    run.report(["bf16", "nvfp4-everywhere", "fp8"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(
        "an older version measured it, and kept of its recipe the name" in one for one in said
    )
    for arm in ("bf16", "nvfp4-everywhere", "fp8"):
        rewritten(measured(), arm, source=run.identity["source"])
    with pytest.raises(SystemExit, match="does not say what recipe bf16 was when it was measured; --collect takes it"):
        measured().waiting()


def test_a_part_that_was_cut_short_is_named(tmp_path: Path, measured: Any) -> None:
    from scripts.eval.text_parts import Part

    run = measured()
    whole = run.file(CELL, "fp8").read_bytes()
    for data in (whole[:-9], whole[:40], b"", b"x", gzip.compress(b"[]"), gzip.compress(b"{}")):
        run.file(CELL, "fp8").write_bytes(data)
        for more in ((), ("--collect",)):
            with pytest.raises(SystemExit, match=r"gsm8k-0-fp8\.json\.gz cannot be read, .*: copy it again, or remove"):
                measured(*more).waiting()
    made = Part({}, *(np.zeros((2, 3), dtype=np.int32) for _ in range(3)))
    file = tmp_path / "essays-64-fp8.npz"
    made.save(file)
    whole = file.read_bytes()
    for data in (whole[:-40], whole[:50], b"", b"x"):
        file.write_bytes(data)
        with pytest.raises(SystemExit, match=r"essays-64-fp8\.npz cannot be read, .*: copy it again, or remove"):
            Part.load(file)
