"""The hooks against the installed SGLang, and against their ledger."""

from __future__ import annotations

import os
import pkgutil
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.hooks import forward, launcher, registry, requests, table
from mixquant_sglang.host.hooks.hook import Hook
from mixquant_sglang.passes.rows import RequestRows
from mixquant_sglang.versions import machine, v0_5_23
from mixquant_sglang.versions.dialect import dialect

LEDGER = Path(__file__).resolve().parents[2] / "patches" / "README.md"


def test_every_target_exists_here() -> None:
    for hook in registry.hooks_of():
        if hook.process != "http":  # those in a process of their own: test_requests.py
            assert registry.target_of(hook) in hook.targets
    absent = {hook.handler for hook in table.HOOKS} - {hook.handler for hook in registry.hooks_of()}
    sessions = {"weights_begin", "weights_end", "session_ended"}
    assert absent & sessions in (set(), sessions)


def test_a_hook_is_left_out_only_where_there_is_nothing_to_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    import pkgutil
    from importlib.util import find_spec

    for hook in table.HOOKS:
        if hook.only_with.startswith("sglang.srt.managers"):
            owner, _, name = hook.only_with.rpartition(".")
            assert (hook in registry.hooks_of()) == hasattr(pkgutil.resolve_name(owner), name)
        elif hook.only_with:
            assert (hook in registry.hooks_of()) == (find_spec(hook.only_with) is not None)
        else:
            assert hook in registry.hooks_of()
    there, nowhere = (
        Hook("schedule_batch", "after", "scheduler", ("sglang.gone",), "is a test", only_with=module)
        for module in ("sglang.srt.server_args", "sglang.not_a_package.module")
    )
    monkeypatch.setattr(registry, "HOOKS", (there, nowhere))
    assert registry.hooks_of("scheduler") == registry.hooks_of() == [there]
    with pytest.raises(MixQuantError, match=r"has no sglang\.gone, which mixquant .* needs: it is a test"):
        registry.check_hooks_took_effect()


def test_ledger_and_code_name_the_same_hooks() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [^|]* \| ([^|]*) \|", LEDGER.read_text(), re.MULTILINE)
    listed = {handler: (kind, tuple(re.findall(r"`([\w.]+)`", targets))) for handler, kind, targets in rows}
    assert listed == {hook.handler: (hook.kind, hook.targets) for hook in table.HOOKS}


def test_where_sglang_reads_the_sizes_of_prefill_graphs() -> None:
    """There ``size_prefill_graphs`` adds one."""
    import inspect

    from sglang.srt.model_executor.model_runner_components.cuda_graph_setup import capture_prefill_graph
    from sglang.srt.server_args import ServerArgs

    resolved_apart = hasattr(ServerArgs, "resolve_once")
    where = "get_exec()" if resolved_apart else "model_runner.server_args"
    tail = ".graph.cuda_graph_config.prefill" if resolved_apart else ".cuda_graph_config.prefill"
    source = inspect.getsource(inspect.unwrap(capture_prefill_graph))
    assert f"prefill_config = {where}{tail}\n" in source and "in prefill_config.bs\n" in source


def test_every_handler_exists_and_nothing_else_is_one() -> None:
    for hook in table.HOOKS:
        assert callable(registry.handler_of(hook))
    assert len({hook.handler for hook in table.HOOKS}) == len(table.HOOKS)


@pytest.mark.parametrize("hook", table.HOOKS, ids=lambda hook: hook.handler)
def test_a_missing_target_is_named_with_its_purpose(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    import pkgutil

    resolve = pkgutil.resolve_name
    gone = {target.rpartition(".")[0] for target in hook.targets}

    def without(name: str) -> Any:
        return object() if name in gone else resolve(name)

    if all(target.endswith(".__init__") for target in hook.targets):
        monkeypatch.setattr(pkgutil, "resolve_name", lambda name: (_ for _ in ()).throw(AttributeError(name)))
    else:
        monkeypatch.setattr(pkgutil, "resolve_name", without)
    with pytest.raises(MixQuantError) as error:
        registry.target_of(hook)
    assert all(target in str(error.value) for target in hook.targets) and hook.why in str(error.value)
    assert machine.sglang_version() in str(error.value) and "pip install" in str(error.value)


def test_a_hook_that_did_not_take_effect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    class Target:
        @classmethod
        def made(cls) -> None: ...

    def other(result: Any, *args: Any) -> None: ...

    hook = Hook("schedule_batch", "after", "scheduler", ("here.made",), "is a test")
    monkeypatch.setattr(registry, "target_of", lambda hook: "here.made")
    monkeypatch.setattr(pkgutil, "resolve_name", lambda name: Target.made)
    assert not registry.took_effect(hook)
    wrapped = _wrap_fn(Target.__dict__["made"].__func__, forward.schedule_batch, HookType.AFTER)
    Target.made = classmethod(_wrap_fn(wrapped, other, HookType.AFTER))  # somebody else's hook on top of ours
    assert registry.took_effect(hook)
    Target.made = classmethod(_wrap_fn(Target.__dict__["made"].__func__.__wrapped__, other, HookType.AFTER))
    assert registry.took_effect(hook)


def test_config_refuses_where_the_hooks_are_missing() -> None:
    from mixquant_sglang.host.config import MixQuantConfig

    with pytest.raises(SystemExit, match=r"the hook on .* is not in place.*--quantization mixquant"):
        MixQuantConfig()


def test_a_recipe_without_bf16_decode_has_no_bf16_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Params:
        custom_params: ClassVar = {"mixquant": {"prefill": "bf16"}}

    monkeypatch.setattr(launcher.asked, "recipe", recipe.load("nvfp4"))
    requests.check_request(None, Params())
    monkeypatch.setattr(launcher.asked, "recipe", recipe.load("nvfp4-everywhere"))
    with pytest.raises(ValueError, match="nvfp4-everywhere has decode nvfp4"):
        requests.check_request(None, Params())


def test_arguments_that_are_already_resolved_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Args:
        quantization = "mixquant"
        tokenizer_worker_num = 2
        _resolution_finished = True

    calls = []
    if not dialect().resolution_finished(Args()):  # 0.5.17 resolves once; arguments that come resolved are newer ones
        monkeypatch.setattr(dialect(), "resolution_finished", v0_5_23.resolution_finished)
    monkeypatch.setenv(machine.ACTIVE_ENV, "1")
    launcher.resolve_server_args(calls.append, Args())
    assert len(calls) == 1 and os.environ[machine.ACTIVE_ENV] == "1"


def test_a_batch_without_a_plan_replays_no_prefill_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from mixquant_sglang.host import runtime
    from mixquant_sglang.host.hooks import graphs
    from mixquant_sglang.recipe.select import Device, select

    asked = recipe.load("nvfp4")
    run = runtime.Runtime(asked, select(asked, Device("this CPU", None)))
    monkeypatch.setattr(runtime, "_runtime", run)
    runner = SimpleNamespace(capture_num_tokens=[4, 8], _pad_to_bucket=lambda n, sizes: min(s for s in sizes if s >= n))
    runner.model_runner = SimpleNamespace(is_draft_worker=False)
    batch = SimpleNamespace(input_ids=[1] * 5)
    assert not graphs.can_replay_prefill(lambda *_: True, runner, batch)
    batch._mixquant_pass = run.schedule.prefill([RequestRows(5, 0, 90)], torch.device("cpu"))
    assert graphs.can_replay_prefill(lambda *_: True, runner, batch)
    assert not graphs.can_replay_prefill(lambda *_: False, runner, batch)
    run.schedule.min_tokens = 9  # the graph of 8 rows is BF16 then
    assert not graphs.can_replay_prefill(lambda *_: True, runner, batch)
