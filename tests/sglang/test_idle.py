"""Installed but not asked for, the plugin changes nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

IDLE = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import QUANTIZATION_CHOICES
import torch
ours = {t for t, hooks in HookRegistry._hooks.items() if any("mixquant" in h[1].__module__ for h in hooks)}
assert {t.rpartition(".")[2] for t in ours} <= {"add_cli_args", "resolve_once", "__post_init__"}, ours
assert "mixquant" in QUANTIZATION_CHOICES
heavy = {"mixquant_sglang.host.config", "mixquant_sglang.layers.linear", "sglang.srt.managers.scheduler",
         "sglang.srt.model_executor.model_runner", "sglang.srt.layers.quantization"} & sys.modules.keys()
assert not heavy, heavy
assert not torch.cuda.is_initialized()
import sglang.srt.layers.quantization as quantization
assert "mixquant" not in quantization.QUANTIZATION_METHODS
print("idle")
"""


@pytest.mark.slow
def test_an_idle_plugin_sets_two_hooks_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IDLE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and done.stdout.endswith("idle\n"), done.stderr[-3000:]
