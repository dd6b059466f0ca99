"""Makes the tables of docs/support.md from docs/support.yaml (what was seen, where) and the package's refusals."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mixquant_sglang.host.refusal import Refusal
from mixquant_sglang.host.refused import REFUSALS

ROOT = Path(__file__).resolve().parents[2]
PAGE, DATA = ROOT / "docs" / "support.md", ROOT / "docs" / "support.yaml"
VERSIONS = ("0.5.17", "0.5.23")


def data() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(DATA.read_text())
    return found


def page(text: str, known: Mapping[str, Any]) -> str:
    """``text`` with its tables made anew; each is between a comment with its name and the comment ``end``."""
    for name, rows in (("seen", seen(known)), ("refused", refused(known))):
        begin, end = f"<!-- {name}: scripts/support_matrix -->\n", "<!-- end -->\n"
        head, found, rest = text.partition(begin)
        _, ended, tail = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"{PAGE.name}: no place for the table {name!r}: {begin!r} and {end!r} around it")
        text = head + begin + "".join(f"| {' | '.join(row)} |\n" for row in rows) + end + tail
    return text


def seen(known: Mapping[str, Any]) -> Iterator[list[str]]:
    """The rows of the table of features, a heading first."""
    columns = known["columns"]
    flags = {refusal.flag: refusal for refusal in REFUSALS}
    yield ["feature", *columns]
    yield ["---"] * (len(columns) + 1)
    for feature in known["features"]:
        name, flag = feature["feature"], feature.get("refused")
        if flag is not None and flag in flags:
            yield [name, *[f"refused: {flags[flag].why}"] * len(columns)]
            continue
        yield [name, *(cell(name, column, feature) for column in columns)]


def cell(name: str, column: str, feature: Mapping[str, Any]) -> str:
    """What is in a cell; raises ``ValueError`` where nothing is."""
    found = feature.get(column, feature.get(column.split()[0]))
    if not found or not (found.get("test") or found.get("said")):
        raise ValueError(f"{DATA.name}: {name!r} has neither a test nor a word for {column}")
    said, test = found.get("said", ""), found.get("test")
    if not test:
        return str(said)
    first, *more = found["of"]
    return f"{said or 'tested'}: `{test}::{first}`{f' and {len(more)} more' if more else ''} ({found['commit']})"


def refused(known: Mapping[str, Any]) -> Iterator[list[str]]:
    """The rows of the table of refusals, a heading first."""
    yield ["flag", "why", "instead", *VERSIONS]
    yield ["---"] * (3 + len(VERSIONS))
    for refusal in REFUSALS:
        flag = f"`{refusal.flag}`" if re.fullmatch(r"--[a-z0-9-]+", refusal.flag) else refusal.flag
        yield [flag, refusal.why, refusal.instead, *(where(refusal, version, known["only"]) for version in VERSIONS)]


def where(refusal: Refusal, version: str, only: Mapping[str, Any]) -> str:
    there = only["fields"].get(refusal.field.partition(".")[0], version)
    if there != version:
        return "no such flag"
    there, otherwise = only["refused"].get(refusal.flag, (version, ""))
    return "refused" if there == version else str(otherwise)


def command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    PAGE.write_text(page(PAGE.read_text(), data()))
