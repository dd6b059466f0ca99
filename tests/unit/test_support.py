"""docs/support.md is what scripts/support_matrix makes of docs/support.yaml and the refusals."""

from __future__ import annotations

import ast
import copy
import fnmatch
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


def functions(text: str) -> dict[str, ast.FunctionDef]:
    """The tests of a file, and what it has beside them."""
    return {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}


def named(cell: Any, text: str) -> dict[str, list[ast.FunctionDef]]:
    """Of each name of the cell: the tests of the file that it is for."""
    tests = {name: node for name, node in functions(text).items() if name.startswith("test_")}
    return {name: [tests[found] for found in fnmatch.filter(tests, name)] for name in cell["of"]}


def asserts(node: ast.AST, beside: dict[str, ast.FunctionDef], seen: frozenset[str] = frozenset()) -> bool:
    """Whether it, or what it calls of the same file, can fail by an assertion."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            called = ast.unparse(inner.func)
            if called in ("pytest.raises", "torch.testing.assert_close"):
                return True
            if called in beside and called not in seen and asserts(beside[called], beside, seen | {called}):
                return True
    return False


def marks(text: str, node: ast.FunctionDef) -> str:
    """The marks of a test and of its file, as they are written."""
    whole = [ast.unparse(part) for part in ast.parse(text).body if isinstance(part, ast.Assign)]
    own = [ast.unparse(mark) for mark in node.decorator_list]
    return "\n".join([*(part for part in whole if part.startswith("pytestmark")), *own])


def by_column(known: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Feature, column and cell of all that name a test."""
    found = []
    for feature in known["features"]:
        for column in known["columns"]:
            cell = feature.get(column, feature.get(column.split()[0]))
            if isinstance(cell, dict) and "test" in cell:
                found.append((feature["feature"], column, cell))
    return found


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


def test_the_tests_of_a_cell_exist_and_can_fail_where_it_says() -> None:
    cells = by_column(support.data())
    assert len(cells) > 50
    for feature, column, cell in cells:
        text = (ROOT / cell["test"]).read_text()
        for name, tests in named(cell, text).items():
            where = f"{feature}, {column}: {cell['test']}::{name}"
            assert tests, f"{where} is no test"
            for node in tests:
                assert asserts(node, functions(text)), f"{where} asserts nothing"
                # a case alone may want a GPU, the test goes without
                of_gpu = "mark.gpu" in marks(text, node).replace("marks=pytest.mark.gpu", "")
                if column.startswith("GPU"):
                    assert of_gpu or "mark.server" in marks(text, node), f"{where} does not ask for a GPU"
                else:
                    assert not of_gpu, f"{where} runs on a GPU alone"
                skipped = re.search(r"startswith\('(0\.5\.\d+)'\)", marks(text, node))
                assert not skipped or not column.endswith(skipped[1]), f"{where} is skipped there"


def test_a_cell_without_a_test_says_something() -> None:
    known = support.data()
    for feature in known["features"]:
        for cell in feature.values():
            if isinstance(cell, dict) and "test" not in cell:
                assert set(cell) == {"said"} and len(cell["said"].split()) >= 3, cell
                assert not re.search(r"\b(todo|tbd|n/a|untested)\b", cell["said"], re.IGNORECASE), cell
                for path in re.findall(r"\b(?:tests|scripts|docs)/[\w./]*\w", cell["said"]):
                    assert (ROOT / path).exists(), cell


def test_a_refused_feature_has_the_flag_in_both_versions() -> None:
    """Its row gives the reason for all columns."""
    known = support.data()
    fields = {refusal.flag: refusal.field.partition(".")[0] for refusal in REFUSALS}
    flags = [feature["refused"] for feature in known["features"] if "refused" in feature]
    assert flags and {*flags} <= fields.keys(), "lifted or renamed: the feature needs cells"
    assert [flag for flag in flags if fields[flag] in known["only"]["fields"] or flag in known["only"]["refused"]] == []


def test_what_goes_with_one_version_names_its_test_or_says_why() -> None:
    for flag, (version, otherwise) in support.data()["only"]["refused"].items():
        assert version in support.VERSIONS and len(otherwise.split()) >= 2, flag
        assert all((ROOT / file).is_file() for file in re.findall(r"tests/\S+\.py", otherwise)), flag


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("pass", False),
        ("x = 1", False),
        ("assert x", True),
        ("helper()", True),
        ("other()", False),
        ("elsewhere.helper()", False),
        ("with pytest.raises(ValueError):\n        x()", True),
    ],
)
def test_a_test_that_asserts_nothing_is_seen(body: str, expected: bool) -> None:
    text = f"def test_it():\n    {body}\ndef helper():\n    assert y\ndef other():\n    other()\n"
    assert asserts(functions(text)["test_it"], functions(text)) is expected


def test_the_commits_are_in_this_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no repository here: the commits cannot be looked up")
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("a shallow clone, in which old commits cannot be looked up")
    for cell in seen_by(support.data()):
        commit = str(cell["commit"])
        before = subprocess.run(["git", "merge-base", "--is-ancestor", commit, "HEAD"], cwd=ROOT, capture_output=True)
        assert before.returncode == 0, f"{commit} is not in this history"
        shown = ["git", "show", f"{commit}:{cell['test']}"]
        then = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True)
        assert then.returncode == 0, f"{commit} has no {cell['test']}"
        gone = [name for name, tests in named(cell, then.stdout).items() if not tests]
        assert gone == [], f"{commit}: {cell['test']} had no test {gone}"
