"""Our Prometheus series beside the labels that SGLang and its users give."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import REGISTRY

from mixquant_sglang.host import metrics
from mixquant_sglang.host.metrics import LABELS
from mixquant_sglang.passes.counters import PassCounters

SGLANGS = {"model_name": "m", "engine_type": "unified", "tp_rank": 0, "pp_rank": 0}


@pytest.fixture(autouse=True)
def registry() -> object:
    before = {*REGISTRY._collector_to_names}
    yield
    for collector in {*REGISTRY._collector_to_names} - before:
        REGISTRY.unregister(collector)


def counted(labels: dict[str, object]) -> PassCounters:
    counters = PassCounters()
    counters.add("prefill", "fp8", {("prefill", "fp8"): 7, ("prefill", "bf16"): 1}, protected=1)
    series = metrics.PrometheusSeries(labels)
    counters.attach(series)
    series.describe(version="0.1.0", recipe="fp8", kernel="fp8:native", layers={"fp8": 144}, extra_bytes=5)
    counters.add("prefill", "fp8", {("prefill", "fp8"): 3}, protected=2)
    counters.add_rows("decode", "bf16", 2)
    return counters


def value(name: str, labels: dict[str, object]) -> float | None:
    return REGISTRY.get_sample_value(name, {key: str(item) for key, item in labels.items()})


@pytest.mark.parametrize("taken", [(), *((label,) for label in LABELS), LABELS, ("phase", "mixquant_phase")])
def test_users_labels_stay_and_ours_are_renamed(taken: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    given = SGLANGS | dict.fromkeys(taken, "theirs")
    with caplog.at_level(logging.WARNING):
        counted(given)
    name = metrics.label_names(given)
    assert [label for label in LABELS if name[label] != label] == [label for label in LABELS if label in taken]
    assert len({*name.values(), *given}) == len(LABELS) + len(given)
    ours = given | {name["phase"]: "prefill", name["precision"]: "fp8"}
    assert value("mixquant:forward_tokens_total", ours) == 10
    assert value("mixquant:forward_passes_total", ours) == 2
    decode = given | {name["phase"]: "decode", name["precision"]: "bf16"}
    assert value("mixquant:forward_tokens_total", decode) == 2
    assert value("mixquant:protected_rows_total", given) == 3
    assert value("mixquant:layers", given | {name["precision"]: "fp8"}) == 144
    assert value("mixquant:extra_weight_bytes", given) == 5
    info = {name["version"]: "0.1.0", name["recipe"]: "fp8", name["kernel"]: "fp8:native"}
    assert value("mixquant:info", given | info) == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(taken)
    assert all(f"{label} is {name[label]}" in said[0] for label in LABELS if label in taken)


def test_the_names_without_a_clash_are_ours() -> None:
    assert metrics.label_names(SGLANGS) == {label: label for label in LABELS}
