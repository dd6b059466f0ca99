"""The plugin where SGLang loads none: processes that unpickle the launcher's arguments."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.host.hooks import arrival
from mixquant_sglang.versions import machine
from tests.sglang.test_refusals import unresolved

# As a Ray actor gets them: a process that knows nothing of SGLang yet, with none of the launcher's environment.
ACTOR = """
import json, os, pickle, sys
args = pickle.loads(sys.stdin.buffer.read())
from mixquant_sglang.host.hooks import launcher, registry
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
print(json.dumps({
    "hooks": all(registry.took_effect(h) for h in registry.hooks_of("launcher", "asked", "scheduler")),
    "method": QUANTIZATION_METHODS["mixquant"].__name__,
    "recipe": launcher.asked.recipe.source,
    "environment": {k: v for k, v in os.environ.items() if k.startswith("MIXQUANT_")},
    "again": pickle.dumps(args) != pickle.dumps(0) and args._mixquant.environment,
    "http": "sglang.srt.entrypoints.http_server" in sys.modules,
}))
"""

# As a tokenizer worker: its app is there, and has built its layers.
WORKER = """
import json, pickle, sys
from sglang.srt.entrypoints.http_server import app
app.middleware_stack = app.build_middleware_stack()
pickle.loads(sys.stdin.buffer.read())
print(json.dumps({"layers": [m.cls.__name__ for m in app.user_middleware], "stack": app.middleware_stack is None}))
"""

# As multiprocessing starts a detokenizer or a scheduler, which load plugins themselves or need none.
SPAWNED = """
import json, multiprocessing, pickle, sys

def target(args):
    print(json.dumps({"loaded": "mixquant_sglang.host.config" in sys.modules, "carried": args._mixquant is not None}))

if __name__ == "__main__":
    args = pickle.loads(sys.stdin.buffer.read())
    del sys.modules["mixquant_sglang.host.config"]
    process = multiprocessing.get_context("spawn").Process(target=target, args=(args,))
    process.start()
    process.join()
"""


def carrying(monkeypatch: pytest.MonkeyPatch, model: Path, wanted: str = "fp8", **given: Any) -> Any:
    """Arguments as they leave the launcher."""
    monkeypatch.setenv(machine.ACTIVE_ENV, "1")
    monkeypatch.setenv(recipe.RECIPE_ENV, wanted)
    args = unresolved(model_path=str(model), quantization="mixquant", **given)
    arrival.carry_plugin(None, args)
    return args


def said(script: str, args: Any, folder: Path, **more: str) -> Any:
    import os

    file = folder / "process.py"
    file.write_text(script)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MIXQUANT_")} | more
    done = subprocess.run(
        [sys.executable, file], input=pickle.dumps(args), capture_output=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads(done.stdout.decode().splitlines()[-1])


@pytest.mark.slow
def test_a_ray_actor_gets_the_plugin(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("version: 1\nprefill: {precision: fp8}\n")
    args = carrying(monkeypatch, tiny_model, "own.yaml", use_ray=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    actor = said(ACTOR, args, elsewhere)
    own = str(tmp_path / "own.yaml")
    environment = {machine.ACTIVE_ENV: "1", recipe.RECIPE_ENV: own}
    assert actor["hooks"] and actor["method"] == "MixQuantConfig" and not actor["http"]
    assert actor["recipe"] == own and actor["environment"] == environment and actor["again"] == environment


@pytest.mark.slow
def test_a_tokenizer_worker_reads_policies(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = said(WORKER, carrying(monkeypatch, tiny_model, tokenizer_worker_num=2), tmp_path)
    assert worker["layers"][-1] == "PolicyLayer" and worker["stack"]


@pytest.mark.slow
def test_nothing_is_loaded_where_multiprocessing_starts_a_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawned = said(SPAWNED, carrying(monkeypatch, tiny_model, tokenizer_worker_num=2), tmp_path)
    assert spawned == {"loaded": False, "carried": True}


def test_only_arguments_that_need_it_carry_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hasattr(carrying(monkeypatch, tiny_model), "_mixquant")
    args = carrying(monkeypatch, tiny_model, tokenizer_worker_num=2)
    assert copy.deepcopy(args._mixquant) is copy.copy(args._mixquant) is args._mixquant  # stays in its process
    monkeypatch.delenv(machine.ACTIVE_ENV)
    args = unresolved(model_path=str(tiny_model), quantization="mixquant", tokenizer_worker_num=2)
    arrival.carry_plugin(None, args)
    assert not hasattr(args, "_mixquant")


def test_a_recipe_that_is_not_there_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant_sglang.host.hooks import launcher, registry

    monkeypatch.setattr(registry, "set_hooks", lambda process: None)
    monkeypatch.setattr(launcher, "register_config", lambda: None)
    for name in (machine.ACTIVE_ENV, recipe.RECIPE_ENV):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: None)
    with pytest.raises(SystemExit, match=r"gone\.yaml: no such file"):
        arrival.arrive({recipe.RECIPE_ENV: str(tmp_path / "gone.yaml")})
