"""Documents that a script makes or a test can hold against the code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from mixquant_sglang import recipe
from mixquant_sglang.recipe.select import Device, select
from tests.support.commands import command_of

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".", "docs", "patches", "tests/models", ".github", ".github/ISSUE_TEMPLATE")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))


def test_the_picture_is_what_the_script_draws(tmp_path: Path) -> None:
    subprocess.run([*command_of("draw_overview"), tmp_path / "out.svg"], check=True)
    assert (tmp_path / "out.svg").read_text() == (ROOT / "docs" / "overview.svg").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert gone == []


def anchors(page: Path) -> set[str]:
    """Those of its headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_are_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())
    gone = [
        f"{link}#{anchor}"
        for link, anchor in links
        if "://" not in link and anchor not in anchors(page.parent / link if link else page)
    ]
    assert not gone


def test_the_example_recipe_is_one() -> None:
    loaded = recipe.load(str(ROOT / "examples" / "custom_recipe.yaml"))
    assert (loaded.prefill, loaded.min_tokens, len(loaded.layers)) == ("fp8", 256, 1)
    assert select(loaded, Device("H200", (9, 0))).kernels == {"fp8": "native"}


def test_shell_and_yaml_of_examples_and_templates_parse() -> None:
    subprocess.run(["bash", "-n", ROOT / "examples" / "serve.sh"], check=True)
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
