"""Warnings are errors in the tests (pyproject.toml), and one made of them has broken what was being imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TEST = """
def test_first_import() -> None:
    import sentencepiece
    assert sentencepiece.SentencePieceProcessor() is not None
"""


def test_python_ends_well_after_a_test_that_imports_sentencepiece(tmp_path: Path) -> None:
    """Of version 0.2.1, imported where its warnings are errors, Python's end is a segmentation fault."""
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path / "test_it.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, (done.returncode, done.stdout, done.stderr)
