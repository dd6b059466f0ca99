"""The plugin where SGLang loads none: processes that unpickle the launcher's arguments."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host import runtime, sent
from mixquant_sglang.host.hooks import arrival, launcher, registry
from mixquant_sglang.recipe.fingerprint import asked_digest
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
    "recipe": [launcher.asked.recipe.source, launcher.asked.recipe.prefill],
    "environment": {k: v for k, v in os.environ.items() if k.startswith("MIXQUANT_")},
    "again": pickle.dumps(args) != pickle.dumps(0) and args._mixquant.environment,
    "http": "sglang.srt.entrypoints.http_server" in sys.modules,
}))
"""

# As a tokenizer worker, whose app is there and has built its layers; and as multiprocessing starts a detokenizer or a
# scheduler, which load plugins themselves or need none.
WORKER = """
import json, multiprocessing, pickle, sys

def target(args):
    print(json.dumps({"loaded": "mixquant_sglang.host.config" in sys.modules, "carried": args._mixquant is not None}))

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import app
    app.middleware_stack = app.build_middleware_stack()
    args = pickle.loads(sys.stdin.buffer.read())
    print(json.dumps({"layers": [m.cls.__name__ for m in app.user_middleware], "stack": app.middleware_stack is None}))
    sys.stdout.flush()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(args,))
    process.start()
    process.join()
"""


def carrying(monkeypatch: pytest.MonkeyPatch, model: Path, wanted: str = "fp8", **given: Any) -> Any:
    """Arguments as they leave the launcher."""
    monkeypatch.setenv(machine.ACTIVE_ENV, "1")
    monkeypatch.setenv(recipe.RECIPE_ENV, wanted)
    monkeypatch.setattr(launcher.asked, "recipe", recipe.load(wanted))
    args = unresolved(model_path=str(model), quantization="mixquant", **given)
    arrival.carry_plugin(None, args)
    return args


def said(script: str, args: Any, folder: Path, **more: str) -> list[Any]:
    file = folder / "process.py"
    file.write_text(script)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MIXQUANT_")} | more
    done = subprocess.run(
        [sys.executable, file], input=pickle.dumps(args), capture_output=True, cwd=folder, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_ray_actor_gets_the_plugin(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("version: 1\nprefill: {precision: fp8}\n")
    args = carrying(monkeypatch, tiny_model, "own.yaml", use_ray=True)
    Path("own.yaml").unlink()  # what the launcher read goes along
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (actor,) = said(ACTOR, args, elsewhere)
    own = str(tmp_path / "own.yaml")
    environment = {machine.ACTIVE_ENV: "1", recipe.RECIPE_ENV: own}
    assert actor["hooks"] and actor["method"] == "MixQuantConfig" and not actor["http"]
    assert (
        actor["recipe"] == ["own.yaml", "fp8"] and actor["environment"] == environment and actor["again"] == environment
    )


@pytest.fixture
def arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> recipe.Recipe:
    """This process is an actor, on a node that does not have the launcher's recipe file."""
    file = tmp_path / "own.yaml"
    file.write_text("version: 1\nprefill: {precision: fp8}\n")
    wanted = recipe.load(str(file))
    file.unlink()
    told = dict.fromkeys(machine.TOLD, "") | {machine.ACTIVE_ENV: "1", machine.ASKED_ENV: asked_digest(wanted)}
    told |= {machine.DETERMINISTIC_ENV: "1", recipe.RECIPE_ENV: str(file)}
    for name in told:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(launcher, "asked", launcher.Asked())
    monkeypatch.setattr(sent, "_sent", None)
    monkeypatch.setattr(launcher, "register_config", lambda: None)
    monkeypatch.setattr(registry, "set_hooks", lambda process: None)
    monkeypatch.setattr(registry, "check_hooks_took_effect", lambda *_: None)
    monkeypatch.setattr(runtime, "_runtime", None)
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: None)
    arrival.arrive(told, wanted)
    return wanted


def test_an_actor_serves_what_the_launcher_read(arrived: recipe.Recipe) -> None:
    from mixquant_sglang.host import config

    config.MixQuantConfig()
    run = runtime.current()
    assert run is not None and run.recipe == arrived and run.environment.invariant


def test_an_actor_asks_nothing_again(arrived: recipe.Recipe, tiny_model: Path) -> None:
    """0.5.17's makes another record of the resolved one, which resolves itself once more."""
    told = {name: os.environ[name] for name in machine.TOLD}
    args = unresolved(model_path=str(tiny_model), quantization="mixquant")
    seen: list[str] = []
    launcher.resolve_server_args(lambda args: seen.append(args.speculative_draft_model_quantization), args)
    assert seen == ["unquant"]  # which SGLang made None of, and would make our method of
    assert {name: os.environ[name] for name in machine.TOLD} == told and launcher.asked.recipe == arrived


def test_all_that_a_launcher_tells_goes_along(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.TOLD:
        monkeypatch.setenv(name, "1")
    carried = carrying(monkeypatch, tiny_model, use_ray=True)._mixquant.environment
    assert {name: carried[name] for name in machine.TOLD} == dict.fromkeys(machine.TOLD, "1")
    constants = {value for name, value in vars(machine).items() if name.endswith("_ENV")}
    assert constants == {*machine.TOLD}


@pytest.mark.slow
def test_a_tokenizer_worker_reads_policies_and_what_multiprocessing_starts_does_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, spawned = said(WORKER, carrying(monkeypatch, tiny_model, tokenizer_worker_num=2), tmp_path)
    assert worker["layers"][-1] == "PolicyLayer" and worker["stack"]
    assert spawned == {"loaded": False, "carried": True}


def test_only_arguments_that_need_it_carry_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hasattr(carrying(monkeypatch, tiny_model), "_mixquant")
    args = carrying(monkeypatch, tiny_model, tokenizer_worker_num=2)
    assert copy.deepcopy(args._mixquant) is copy.copy(args._mixquant) is args._mixquant  # stays in its process
    monkeypatch.delenv(machine.ACTIVE_ENV)
    args = unresolved(model_path=str(tiny_model), quantization="mixquant", tokenizer_worker_num=2)
    arrival.carry_plugin(None, args)
    assert not hasattr(args, "_mixquant")


def test_what_is_missing_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(process: str) -> None:
        raise MixQuantError(f"the hook of {process} is not in place")

    monkeypatch.setattr(registry, "set_hooks", gone)
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: None)
    with pytest.raises(SystemExit, match="mixquant: the hook of asked is not in place"):
        arrival.arrive({}, recipe.load("fp8"))


def test_a_recipe_that_changed_since_the_launch_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas read the recipe one by one."""
    from mixquant_sglang.host import config

    file = tmp_path / "own.yaml"
    file.write_text("version: 1\nprefill: {precision: fp8}\n")
    monkeypatch.setenv(recipe.RECIPE_ENV, str(file))
    monkeypatch.setenv(machine.ASKED_ENV, asked_digest(recipe.load(str(file))))
    monkeypatch.setattr(registry, "check_hooks_took_effect", lambda *_: None)
    monkeypatch.setattr(runtime, "_runtime", None)
    config.MixQuantConfig()
    file.write_text("version: 1\n# the same\nprefill: {precision: fp8}\n")
    config.MixQuantConfig()
    file.write_text("version: 1\nprefill: {precision: nvfp4}\n")
    with pytest.raises(SystemExit, match=r"own\.yaml has changed since this server was launched: start it again"):
        config.MixQuantConfig()
