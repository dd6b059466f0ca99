"""Every family of models on SGLang's own model runner: recipe bf16 is stock to the last bit, and what recipe auto makes
low, protects, counts and reports is what it should.

One process runs the families that have code for a CPU, another those whose Triton kernels need the interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest

from mixquant_sglang.versions import machine
from scripts.models.families import FAMILIES
from scripts.models.make_family_models import make
from tests.support import families, model_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ON_CPU = [name for name in families.chosen() if machine.sglang_version() not in families.EXPECTED[name].cpu]


def test_each_family_is_expected_to_be_something() -> None:
    assert [*families.EXPECTED] == [*FAMILIES]


def test_every_family_with_a_tower_is_shown_an_image() -> None:
    """Two images, whose logits differ (``families.problems``)."""
    towers = {name for name, family in FAMILIES.items() if "vision_config" in (family.whole or {})}
    shown = {name for name, expected in families.EXPECTED.items() if expected.image}
    assert shown == towers


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families")
    out: dict[str, dict[str, Any]] = {}
    for interpreted in (False, True):
        names = [name for name in ON_CPU if families.EXPECTED[name].interpreted is interpreted]
        cases: dict[tuple[str, str], dict[str, Any]] = {}
        for name in names:
            expected = families.EXPECTED[name]
            more = {"survive": True, "steps": 1 if interpreted else 6}
            of_family = families.cases(name, str(make(folder, name)), more, expected.cpu_args)
            cases |= {(name, kind): case for kind, case in of_family.items()}
        env = model_runs.CPU | ({"TRITON_INTERPRET": "1"} if interpreted else {})
        for (name, kind), result in zip(cases, model_runs.run([*cases.values()], folder, env, 300), strict=True):
            out.setdefault(name, {})[kind] = result
    return out


@pytest.mark.parametrize("name", ON_CPU)
def test_family(name: str, ran: dict[str, dict[str, Any]]) -> None:
    assert not families.problems(name, ran[name], attention="fp8", others="nvfp4")
