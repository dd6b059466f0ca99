"""What tests of kernels import by themselves, under the warnings that are errors here."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORT = """
import sys
from _pytest.config import apply_warning_filters
apply_warning_filters(sys.argv[1:], [])
import flashinfer.norm
"""


@pytest.mark.slow
def test_flashinfer_is_imported_without_an_error(pytestconfig: pytest.Config) -> None:
    """As ``sgl_kernel`` does at its import; in a process where SGLang has not done so before."""
    pytest.importorskip("flashinfer")
    filters = pytestconfig.getini("filterwarnings")
    assert filters[0] == "error"
    command = [sys.executable, "-c", IMPORT, *filters]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
