"""examples/monitoring against the series that there are: those of this package, and of the SGLang that is installed."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixquant_sglang.host.metrics import LABELS
from tests.support.promql import Selector, parse

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
# What the sample of a series is called, by the kind of its collector.
SUFFIXES = {
    "Counter": ("_total",),
    "Gauge": ("",),
    "Histogram": ("_bucket", "_sum", "_count"),
    "Summary": ("_sum", "_count"),
}
SCRAPED = {"up"}  # Prometheus's own
SGLANG_LABELS = {"engine_type", "mode", "status_code", "endpoint", "priority", "le"}


@cache
def source(package: str) -> tuple[str, ...]:
    """The text of its Python files that name series; SGLang is read and not imported."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    folders = {"sglang": "srt"}
    root = Path(found.origin).parent / folders.get(package, "")
    prefix = f"{package.partition('_')[0]}:"
    texts = (file.read_text(errors="replace") for file in root.rglob("*.py"))
    return tuple(text for text in texts if prefix in text)


@cache
def exported(package: str) -> frozenset[str]:
    """The names of samples of the collectors that the package makes."""
    prefix = f"{package.partition('_')[0]}:"
    names = set()
    for text in source(package):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            kind = getattr(node.func, "id", getattr(node.func, "attr", "")).removeprefix("Prometheus")
            given = [*(keyword.value for keyword in node.keywords if keyword.arg == "name"), *node.args[:1]]
            if kind in SUFFIXES and given and isinstance(given[0], ast.Constant):
                name = str(given[0].value)
                if name.startswith(prefix):
                    name = name.removesuffix("_total") if kind == "Counter" else name
                    names |= {name + suffix for suffix in SUFFIXES[kind]}
    return frozenset(names)


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def drawn() -> list[str]:
    variables = [v["query"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]
    looked_up = [re.fullmatch(r"label_values\((.+), \w+\)", query) for query in variables]
    assert all(looked_up)
    return [
        *(target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])),
        *(found[1] for found in looked_up if found),
    ]


def selectors(expressions: list[str]) -> list[Selector]:
    return [selector for text in expressions for selector in parse(text).selectors]


def test_the_series_of_the_packages_are_found() -> None:
    assert {"mixquant:forward_tokens_total", "mixquant:info", "mixquant:layers"} <= exported("mixquant_sglang")
    assert len(exported("sglang")) > 120 and "sglang:token_usage" in exported("sglang")
    assert "sglang:queue_time_seconds_bucket" in exported("sglang")


@pytest.mark.parametrize("name", ["dashboard", "alerts"])
def test_what_is_named_is_exported(name: str) -> None:
    expressions = drawn() if name == "dashboard" else [rule["expr"] for rule in rules()]
    named = {selector.metric for selector in selectors(expressions)}
    assert len(named) > 10
    assert named - exported("mixquant_sglang") - exported("sglang") - SCRAPED == set()


def test_what_this_package_exports_is_drawn() -> None:
    assert exported("mixquant_sglang") - {selector.metric for selector in selectors(drawn())} == set()


def test_labels_are_those_of_the_series() -> None:
    targets = {"job", "instance", *SGLANG_LABELS}
    found = [parse(text) for text in [*drawn(), *(rule["expr"] for rule in rules())]]
    for parser in found:
        assert parser.labels <= {*targets, *LABELS}, parser.text
        for selector in parser.selectors:
            own = set(LABELS) if selector.metric.startswith("mixquant:") else set()
            assert {label for label, *_ in selector.matchers} <= targets | own, parser.text
            for label, _, value in selector.matchers:
                if label == "phase":
                    assert set(value.split("|")) <= {"prefill", "decode", "verify"}
                if label == "mode":
                    assert any(value in text for text in source("sglang"))


def test_counters_are_looked_at_as_rates_or_as_more_than_none() -> None:
    for text in [*drawn(), *(rule["expr"] for rule in rules())]:
        for selector in parse(text).selectors:
            if selector.metric.endswith(("_total", "_bucket")) and not selector.function:
                assert text.startswith(selector.metric) and "} > 0" in text, text


def test_every_alert_says_what_it_is_and_has_a_place_in_the_documents() -> None:
    page = (FOLDER.parents[1] / "docs" / "operations.md").read_text()
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
        assert f"`{rule['alert']}`" in page, rule["alert"]
    assert set(re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE)) == set(names)


def test_every_alert_has_a_test_of_promtools() -> None:
    loaded = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())
    tested = [case for group in loaded["tests"] for case in group["alert_rule_test"]]
    assert {case["alertname"] for case in tested} == {rule["alert"] for rule in rules()}
    assert all(case["exp_alerts"] for case in tested)
    given = {
        selector.metric
        for group in loaded["tests"]
        for s in group["input_series"]
        for selector in selectors([s["series"]])
    }
    assert given - exported("mixquant_sglang") - exported("sglang") - SCRAPED == set()


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool on this machine; the grammar is checked without"
)
def test_promtool_agrees() -> None:
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "alerts_test.yml")):
        done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_loads_the_rules_and_scrapes_the_jobs_that_they_name() -> None:
    loaded = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / file).is_file() for file in loaded["rule_files"])
    jobs = [scrape["job_name"] for scrape in loaded["scrape_configs"]]
    named = {
        value for rule in rules() for s in selectors([rule["expr"]]) for label, _, value in s.matchers if label == "job"
    }
    assert named and all(re.fullmatch(pattern, job) for pattern in named for job in jobs)


def test_panels_lie_side_by_side() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"


# -- the grammar itself ---


def test_expressions_are_read() -> None:
    parser = parse('sum by (a, b) (rate(x:y_total{c=~"1|2", d!="e"}[5m])) / 2 > 0.5 and on (a) max(z) unless w{k=\'\'}')
    assert parser.labels == {"a", "b"}
    assert parser.selectors == [
        Selector("x:y_total", (("c", "=~", "1|2"), ("d", "!=", "e")), "rate"),
        Selector("z"),
        Selector("w", (("k", "=", ""),)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "sum(",
            "sum(x))",
            "x{a=1}",
            "x{a}",
            "x[5m]",
            "rate(x)",
            "rate(x[5])",
            "rat(x[5m])",
            "x >",
            "x y",
            "x and",
            "> 1",
        ),
        *("sum by a (x)", 'x{a="b}', "histogram_quantile(x)", "sum(x[5m])", "x + y[5m]", 'x{a=~"("}', "", "x{a:b='c'}"),
    ],
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises((ValueError, re.error)):
        parse(text)
