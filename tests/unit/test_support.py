"""docs/support.md is what scripts/support_matrix makes of docs/support.yaml and the refusals."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixquant_sglang.host.refused import REFUSALS
from scripts.tools import support

ROOT = Path(__file__).resolve().parents[2]


def seen_by(known: dict[str, Any]) -> list[dict[str, str]]:
    cells = (cell for feature in known["features"] for cell in feature.values() if isinstance(cell, dict))
    return [cell for cell in cells if "test" in cell]


def test_the_page_is_what_the_script_makes() -> None:
    text = support.PAGE.read_text()
    assert support.page(text, support.data()) == text, "scripts/support_matrix makes it anew"


def test_no_cell_is_empty() -> None:
    known = support.data()
    rows = [*support.seen(known), *support.refused(known)]
    assert all(cell.strip() for row in rows for cell in row)
    assert len({len(row) for row in support.seen(known)}) == 1
    assert len(rows) == 4 + len(known["features"]) + len(REFUSALS)
    broken = copy.deepcopy(known)
    del broken["features"][0]["GPU"]
    with pytest.raises(ValueError, match=r"support\.yaml: .* has neither a test nor a word for GPU 0\.5\.17"):
        list(support.seen(broken))


def test_a_feature_needs_cells_once_its_refusal_is_lifted() -> None:
    known = support.data()
    known["features"] = [{"feature": "a new one", "refused": "--no-longer-refused"}]
    with pytest.raises(ValueError, match="'a new one' has neither"):
        list(support.seen(known))


def test_what_a_cell_names_exists() -> None:
    known = support.data()
    assert len(seen_by(known)) > 20
    for cell in seen_by(known):
        assert (ROOT / cell["test"]).is_file(), cell
        assert re.fullmatch(r"[0-9a-f]{7,}", str(cell["commit"])), cell
    said = [str(cell.get("said", "")) for f in known["features"] for cell in f.values() if isinstance(cell, dict)]
    for file in re.findall(r"tests/\S+\.py", " ".join(said)):
        assert (ROOT / file).is_file(), file
    flags = {refusal.flag for refusal in REFUSALS}
    assert {*known["only"]["refused"]} <= flags
    assert {*known["only"]["fields"]} <= {refusal.field for refusal in REFUSALS}


def test_the_commits_are_in_this_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository here: the commits cannot be looked up")
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("a shallow clone, in which old commits cannot be looked up")
    for commit in {str(cell["commit"]) for cell in seen_by(support.data())}:
        found = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True)
        assert found.returncode == 0, commit
