"""One file a version with the same names, picked by what the installed SGLang has."""

from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mixquant_sglang.host.hooks import registry, table
from mixquant_sglang.versions import dialect as picking
from mixquant_sglang.versions import machine, v0_5_17, v0_5_23
from mixquant_sglang.versions.dialect import VERSIONS, Dialect, dialect, hook_targets


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Any:
    picking.dialect.cache_clear()
    yield
    monkeypatch.undo()
    picking.dialect.cache_clear()


def _own(module: ModuleType) -> dict[str, Any]:
    found = {n: v for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__}
    return found | {n: v for n, v in vars(module).items() if n.isupper()}


def test_both_files_have_the_names_of_the_dialect_and_no_others() -> None:
    names = {name for name in vars(Dialect) if not name.startswith("_")}
    for module in VERSIONS:
        assert {name for name in _own(module) if not name.startswith("_")} == names
    for name in names - {"HOOK_TARGETS"}:
        shapes = [len(inspect.signature(getattr(module, name)).parameters) for module in VERSIONS]
        assert shapes[0] == shapes[1] == len(inspect.signature(getattr(Dialect, name)).parameters) - 1, name


def test_the_file_of_the_installed_version_is_picked() -> None:
    assert dialect().__name__.endswith("v" + machine.sglang_version().replace(".", "_"))
    assert dialect() is dialect()


def test_the_version_string_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dialect()
    picking.dialect.cache_clear()
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0.9.9")
    assert dialect() is found


@pytest.mark.parametrize(
    ("has", "picked"),
    [
        ({"resolve_once": None, "__post_init__": None}, v0_5_23),
        ({"__post_init__": None}, v0_5_17),
        ({}, v0_5_17),  # neither: as the oldest
    ],
)
def test_a_file_is_picked_by_what_there_is(
    has: dict[str, None], picked: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.server_args.ServerArgs", type("ServerArgs", (), has))
    assert dialect() is picked


def test_targets_that_differ_are_those_of_this_version() -> None:
    here = dialect().HOOK_TARGETS
    handlers = {handler for version in VERSIONS for handler in version.HOOK_TARGETS}
    hooks = {hook.handler: hook for hook in table.HOOKS}
    for handler in handlers:
        assert hooks[handler].targets == hook_targets(handler)
        assert (hooks[handler] in registry.hooks_of()) == (handler in here)
        if handler in here:
            assert registry.target_of(hooks[handler]) == here[handler]


def test_what_one_rank_has_of_a_linear() -> None:
    assert v0_5_17.tensor_parallel(SimpleNamespace(tp_rank=1, tp_size=4)) == (1, 4)
    assert v0_5_23.tensor_parallel(SimpleNamespace(tp_group=SimpleNamespace(rank_in_group=1, world_size=4))) == (1, 4)
    assert (
        v0_5_17.tensor_parallel(SimpleNamespace()) == v0_5_23.tensor_parallel(SimpleNamespace(tp_group=None)) == (0, 1)
    )
    assert v0_5_23.tensor_parallel(SimpleNamespace()) == (0, 1)


def test_versions_between_are_taken_as_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wheels of 0.5.18 to 0.5.22 have."""
    from sglang.srt.mem_cache import utils

    assert v0_5_23.tensor_parallel(SimpleNamespace(tp_rank=1, tp_size=4)) == (1, 4)
    ranges: list[tuple[int, int]] = []
    v0_5_23.set_first_chunk(SimpleNamespace(set_extend_range=lambda *given: ranges.append(given)), 7)
    newer = SimpleNamespace()
    v0_5_23.set_first_chunk(newer, 7)
    assert ranges == [(0, 7)] and newer.extend_end == 7
    monkeypatch.delattr(utils, "storage_namespace_seed", raising=False)
    assert not v0_5_23.stored_pages_are_named()
    for module in (v0_5_17, v0_5_23):
        lazy = SimpleNamespace(_forward_method=None, _resolve_forward_method=lambda: max)
        assert module.forward_method(lazy) is max and lazy._forward_method is max
    measuring = "sglang.srt.model_executor.runner.flashinfer_autotune.flashinfer_autotune_context"
    monkeypatch.setattr(measuring, lambda runner, *, run_lm_head: None)
    assert v0_5_17.autotune_logits() == {"run_lm_head": True}
    monkeypatch.setattr(measuring, lambda runner, *, skip_logits: None)
    assert v0_5_17.autotune_logits() == {"skip_logits": False}


def test_arguments_of_the_measuring_are_those_it_takes() -> None:
    from sglang.srt.model_executor.runner.flashinfer_autotune import flashinfer_autotune_context

    known = inspect.signature(flashinfer_autotune_context).parameters
    assert {*dialect().autotune_logits()} == {*known} - {"model_runner"}
