"""Weight-update sessions of quantised checkpoints: scales that are one, part by part, and what their end answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks import weights as update
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.recipe import load
from mixquant_sglang.recipe.roles import by_role
from mixquant_sglang.recipe.select import Device, select
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.quantised_linear import QuantisedLinear
from mixquant_sglang.weights.ready_made_linear import Share
from tests.support.quantised_checkpoints import Tensors
from tests.unit.test_quantised import QKV, K, Q, V, quantised, save, weights

UPDATER = SimpleNamespace(get_model_runner=lambda: SimpleNamespace(is_draft_worker=False))


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[QuantisedCheckpoint, QuantisedLinear, Tensors]:
    """q, k and v with one tensor scale, joined."""
    made, _ = quantised("nvfp4 modelopt", weights())
    checkpoint, came = QuantisedCheckpoint.open(save(tmp_path / "c", "nvfp4 modelopt", made)), list[Any]()
    linear = QuantisedLinear(checkpoint, QKV, checkpoint.of_linear(QKV, (Q, K, V)))
    linear.place(Share((256, 128, 128), 256, 256), torch.device("cpu"), came.append)
    list(checkpoint.sorted_out(made.items()))
    assert len(linear.pieces(came[0])) == 1
    return checkpoint, linear, made


def part(made: Tensors, module: str, factor: float = 1.0) -> Tensors:
    found = {name: tensor for name, tensor in made.items() if name.startswith(f"{module}.")}
    return found | {f"{module}.weight_scale_2": found[f"{module}.weight_scale_2"] * factor}


def test_parts_that_come_one_by_one_keep_one_scale(
    loaded: tuple[QuantisedCheckpoint, QuantisedLinear, Tensors],
) -> None:
    checkpoint, linear, made = loaded
    for factor in (2.0, 3.0):  # the second round begins when the first is whole
        for module in (Q, K, V):
            assert checkpoint.differing(part(made, module, factor)) is None
            list(checkpoint.sorted_out(part(made, module, factor).items()))
        assert not linear.begun


def test_a_part_whose_scale_is_not_that_of_parts_before_is_refused(
    loaded: tuple[QuantisedCheckpoint, QuantisedLinear, Tensors],
) -> None:
    """One call each: it was a success, and could not be packed when the session had ended."""
    checkpoint, linear, made = loaded
    list(checkpoint.sorted_out(part(made, Q, 2.0).items()))
    said = str(checkpoint.differing(part(made, K)))
    assert said.startswith(f"{K}.weight_scale_2 is not that of {Q}.weight_scale_2, which came before, with which it")
    assert checkpoint.differing(part(made, K, 2.0)) is None  # so it can still be completed
    assert checkpoint.differing(part(made, Q) | part(made, K) | part(made, V)) is None  # or begun anew
    linear.forget()
    assert checkpoint.differing(part(made, K)) is None


class Layer:
    """Without a master."""

    shape, extra_bytes, decodes_low, decodes_by_value, by_value = (1, 1), 0, True, False, ()
    stale, masterless, precision = False, True, by_role("nvfp4", "w4a16")

    def __init__(self, name: str) -> None:
        self.name, self.fails = name, ""

    def pack(self) -> None:
        if self.fails:
            raise ValueError(self.fails)

    def pack_arrived(self, _weight: Any) -> None:
        self.pack()

    def forget_arrived(self) -> None:
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    made = Runtime(asked := load("nvfp4-compact"), select(asked, Device("this CPU", None)))
    made.weights.layers += [Layer("a"), Layer("b"), Layer("c")]  # type: ignore[list-item]
    made.weights.finish_load()
    monkeypatch.setattr(runtime, "_runtime", made)
    yield made


def session() -> Any:
    update.weights_begin(UPDATER)

    def end(_manager: Any, _request: Any) -> Any:
        update.weights_end(None, UPDATER)
        return SimpleNamespace(success=True, message="Success")

    return update.session_ended(end, None, None)


def test_the_end_of_a_session_says_which_weights_are_old(run: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    a, _, c = run.weights.layers
    a.fails, c.fails = "scales differ", "only parts came"  # type: ignore[attr-defined]
    with caplog.at_level(logging.ERROR):
        answer = session()
    said = "cannot pack a: scales differ; of before the update are the weights: a, c"
    assert not answer.success and answer.message == f"mixquant: {said}; passes run in w4a16 whole, as packed last"
    assert run.state()["weights_mixed"] == said and any(said in record.message for record in caplog.records)
    a.fails = c.fails = ""  # type: ignore[attr-defined]
    answer = session()
    assert answer.success and answer.message == "Success" and "weights_mixed" not in run.state()


def test_bf16_weights_are_all_new_where_packing_fails(run: Runtime) -> None:
    for layer in run.weights.layers:
        layer.masterless = False  # type: ignore[misc]
    run.weights.layers[1].fails = "no memory"  # type: ignore[attr-defined]
    answer = session()
    assert answer.success and answer.message.startswith(
        "Success mixquant: cannot pack b: no memory; passes run in BF16"
    )
    assert "weights_mixed" not in run.state()
