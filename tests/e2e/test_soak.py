"""``scripts/soak``, briefly, on a server of its own: the long runs are by hand.

With 0.5.23 its scheduler is killed too (a start more); with 0.5.17 ``test_pairs`` does that.
"""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.commands import command_of

pytestmark = [pytest.mark.once, pytest.mark.server, pytest.mark.timeout(2400)]

KILLS = 0 if version("sglang").startswith("0.5.17") else 1


def test_a_short_soak_is_right_in_all(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rounds of 12 s, memory apart: a minute is too short to see it grow."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--minutes", "0.7", "--round", "12", "--agents", "3", "--kills", str(KILLS), "--growth", "10"]
    command = [*command_of("soak"), *options, "--logs", str(logs / "soak")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    print(run.stdout)
    found = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == 0 and found["ok"], run.stdout[-6000:] + run.stderr[-2000:]
    assert found["wrong"] == found["lost"] == 0 and found["problems"] == []
    assert found["requests"]["right"] >= 30 and found["rounds"] == 4 + KILLS
    assert found["requests"]["refused"] > 0, "a burst fills the queue"
    wanted = {"abort", "close", "malformed", "burst", "abort of all", "pause with retraction", "weight update"}
    assert wanted | ({"server killed"} if KILLS else set()) <= found["faults"].keys()
    assert [life["server"] for life in found["memory"]] == ["server"] * (1 + KILLS)
    if not KILLS:  # a life that is cut is too short to tell
        assert found["memory"][0]["growth_percent"] is not None
