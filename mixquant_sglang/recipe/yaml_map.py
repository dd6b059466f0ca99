"""A mapping of a YAML file, read by its nodes: the keys that it may have, their types, and the lines they stand in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.text import did_you_mean, nearest, show


def _kind(node: yaml.Node) -> str:
    """What a node is, in words, with its text where it has one."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    tag = str(node.tag).rpartition(":")[2]
    if tag == "null":
        return "empty"
    words = {"str": "text", "int": "an integer", "float": "a decimal number", "bool": "a boolean"}
    return f"{words.get(tag, f'a value tagged {show(str(node.tag))}')} ({show(node.value)})"


@dataclass(frozen=True)
class YamlMap:
    """One mapping of the file: only the keys it may have, each with its node; ``path`` is its dotted name."""

    file: str
    path: str
    line: int
    nodes: dict[str, yaml.Node]

    @classmethod
    def of(cls, file: str, path: str, node: yaml.Node, allowed: tuple[str, ...]) -> YamlMap:
        made = cls(file, path, node.start_mark.line + 1, {})
        keys = f"; allowed: {', '.join(allowed)}"
        if not isinstance(node, yaml.MappingNode):
            raise made.error("", f"must be a mapping, is {_kind(node)}{keys}")
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise made.error("", f"a key must be text, is {_kind(key)}{keys}", line)
            if key.value not in allowed:
                raise made.error(key.value, f"unknown key{keys}{did_you_mean(nearest(key.value, allowed))}", line)
            if key.value in made.nodes:
                raise made.error(key.value, "is given twice in this mapping", line)
            made.nodes[key.value] = value
        return made

    def at(self, key: str, line: int | None = None) -> str:
        """Where ``key`` stands: "file:line path.of.key"."""
        if line is None:
            line = self.nodes[key].start_mark.line + 1 if key in self.nodes else self.line
        # An unknown key is the user's own text: keep the message short and in one line whatever it holds.
        shown = key if key.isprintable() and len(key) <= 80 else show(key)
        path = ".".join(part for part in (self.path, shown) if part)
        return f"{self.file}:{line}{' ' if path else ''}{path}"

    def error(self, key: str, what: str, line: int | None = None) -> MixQuantError:
        return MixQuantError(f"{self.at(key, line)}: {what}")

    def require(self, key: str, allowed: str) -> None:
        if key not in self.nodes:
            raise self.error(key, f"is missing; allowed: {allowed}")

    def section(self, key: str, allowed: tuple[str, ...]) -> YamlMap:
        if key not in self.nodes:
            return YamlMap(self.file, key, self.line, {})
        return YamlMap.of(self.file, key, self.nodes[key], allowed)

    def entries(self, key: str, allowed: tuple[str, ...]) -> Iterator[YamlMap]:
        node = self.nodes.get(key)
        if node is None:
            return
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(key, f"must be a list, is {_kind(node)}; allowed: a list of {{{', '.join(allowed)}}}")
        for i, entry in enumerate(node.value):
            yield YamlMap.of(self.file, f"{key}[{i}]", entry, allowed)

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self._scalar(key, "str", "text", f"; allowed: {', '.join(allowed)}")
        if value is not None and value not in allowed:
            wrong = f"{show(value)} is not one of them; allowed: {', '.join(allowed)}"
            raise self.error(key, wrong + did_you_mean(nearest(value, allowed)))
        return default if value is None else value

    def text(self, key: str, allowed: str = "") -> str:
        return self._scalar(key, "str", "text", allowed) or ""

    def boolean(self, key: str, default: bool) -> bool:
        value = self._scalar(key, "bool", "a boolean", "; allowed: true, false")
        if value is not None and value not in ("true", "false"):  # YAML's other spellings: yes, on, True, ...
            raise self.error(key, f"{show(value)} is not one of them; allowed: true, false")
        return default if value is None else value == "true"

    def auto_or_integer(self, key: str, least: int) -> int | None:
        """None for ``auto``, which it is when it is not given."""
        node = self.nodes.get(key)
        text = isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"
        if node is None or (text and node.value == "auto"):
            return None
        return self.integer(key, least, least, " or auto")

    def integer(self, key: str, default: int, least: int | None = None, other: str = "") -> int:
        allowed = "; allowed: an integer" + (f" of at least {least}" if least is not None else "") + other
        value = self._scalar(key, "int", "an integer", allowed)
        if value is None:
            return default
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,17})", value):  # YAML would read 012 as 10 and 1:30 as 90
            raise self.error(key, f"{show(value)} is not written in plain decimal digits{allowed}")
        if least is not None and int(value) < least:
            raise self.error(key, f"{value} is too small{allowed}")
        return int(value)

    def _scalar(self, key: str, tag: str, word: str, allowed: str) -> str | None:
        node = self.nodes.get(key)
        if node is None:
            return None
        if not isinstance(node, yaml.ScalarNode) or node.tag != f"tag:yaml.org,2002:{tag}":
            raise self.error(key, f"must be {word}, is {_kind(node)}{allowed}")
        return str(node.value)
