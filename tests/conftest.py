"""Shared fixtures: the tiny model, and where servers keep their logs."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.commands import command_of, provide

provide()

if torch.cuda.is_available():  # of the tiny models that tests serve, low precision pays at no length
    os.environ.setdefault("MIXQUANT_MIN_TOKENS", "1")

ROOT = Path(__file__).resolve().parent.parent

LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Counts by the first of these markers that a test has."""
    for item in items:
        left_out = item.config.stash.setdefault(LEFT_OUT, Counter())
        left_out[next((name for name in ("gpu", "server", "slow") if name in item.keywords), "other")] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, None)
    if left_out:
        each = ", ".join(f"{count} {name}" for name, count in sorted(left_out.items()))
        terminalreporter.write_line(f"left out by -m or -k: {left_out.total()} tests ({each})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU, which this machine does not have")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A trained Qwen3 of 11.2M parameters with tokenizer and chat template (tests/models/README.md)."""
    return ROOT / "tests" / "models" / "tiny-qwen3"


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of random weights in one file, with a head of its own, from scripts/make_tiny_model."""
    out = tmp_path_factory.mktemp("model") / "random"
    subprocess.run([*command_of("make_tiny_model"), out], check=True, timeout=300)
    return out


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")
