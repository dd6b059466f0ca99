"""A recipe says which precision each phase and each layer gets; this file reads one and refuses what it cannot mean.

A recipe is a small YAML file, shipped (``configs/``, asked for by name) or the user's (asked for by path). Nothing in
it is guessed: an unknown key, a wrong type or a pattern that does not compile ends in one line that says where, what is
allowed and which name is nearest. Lines come from the YAML nodes, and a node's text is read here and never constructed,
so YAML's surprises (``off`` is a boolean, ``012`` is ten, ``!!python/...``) become errors and not values.

Which rule applies to which module: ``matching.py``. Whether this GPU can run a precision: not decided here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from mixquant_sglang.errors import MixQuantError

RECIPE_ENV = "MIXQUANT_RECIPE"
DEFAULT = "auto"
REGEX = "re:"

PRECISIONS = ("bf16", "nvfp4", "fp8")
PREFILL_PRECISIONS = ("auto", *PRECISIONS)
KERNELS = ("auto", "native", "emulated")
SCALES = ("absmax", "search")
KEYS = ("version", "description", "prefill", "decode", "protect", "kernel", "verify", "weights", "layers")


@dataclass(frozen=True)
class LayerRule:
    """One entry of ``layers``; a phase that is None keeps the recipe's default for that phase. An ``optional`` one may
    match no layer of a model."""

    match: str
    prefill: str | None
    decode: str | None
    where: str  # "file:line"
    optional: bool = False

    def to_yaml(self) -> dict[str, object]:
        """As an entry of ``layers``."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        asked = {phase: value for phase, value in phases.items() if value is not None}
        return {"match": self.match, **asked, **({"optional": True} if self.optional else {})}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; ``name`` is what was asked for (a shipped name or a path), ``source`` the file it came from."""

    name: str
    source: str
    prefill: str
    min_tokens: int
    fuse: bool  # quantise activations inside the norms and activations before the linears
    decode: str
    protect_last_prompt_token: bool
    kernel: str
    scales: str
    layers: tuple[LayerRule, ...]
    description: str = ""
    protected_tail: int = 1  # how many tokens at the prompt's end protect_last_prompt_token keeps in BF16
    verify: bool = True  # compare the native NVFP4 kernel with the emulated one at load
    prefill_weights: str = ""  # the folder or hub name of an NVFP4 checkpoint; "" packs from the BF16 one
    prefill_weights_at: str = ""  # "file:line prefill.weights"

    def to_yaml(self) -> str:
        """A file that ``load`` reads as this recipe again, but for where it stands: name, source and lines."""
        prefill = {"precision": self.prefill, "min_tokens": self.min_tokens, "fuse": self.fuse}
        tail = {"last_prompt_tokens": self.protected_tail} if self.protect_last_prompt_token else {}
        made = {
            "version": 1,
            **({"description": self.description} if self.description else {}),
            "prefill": prefill | ({"weights": self.prefill_weights} if self.prefill_weights else {}),
            "decode": {"precision": self.decode},
            "protect": {"last_prompt_token": self.protect_last_prompt_token} | tail,
            "kernel": self.kernel,
            "verify": self.verify,
            "weights": {"scales": self.scales},
            **({"layers": [rule.to_yaml() for rule in self.layers]} if self.layers else {}),
        }
        return yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=1 << 20, allow_unicode=True)


def requested() -> str:
    """The recipe that the environment asks for, else the default; an empty variable counts as unset."""
    return os.environ.get(RECIPE_ENV) or DEFAULT


def shipped() -> dict[str, Path]:
    """The recipes of this package: name -> file, in alphabetical order."""
    here = Path(__file__).resolve().parent
    # In a wheel they lie inside the package; in a checkout, from whose root `python -m` imports us too, beside it.
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"), key=lambda file: file.stem)}


def load(name_or_path: str) -> Recipe:
    """Read a recipe: a value with a path separator or ending in .yaml/.yml is a file, otherwise a shipped name.

    Raises MixQuantError, in one line, for whatever is wrong with the name, the file or its contents.
    """
    separators = [sep for sep in (os.sep, os.altsep) if sep]
    if any(sep in name_or_path for sep in separators) or name_or_path.lower().endswith((".yaml", ".yml")):
        path = Path(name_or_path)
    else:
        known = shipped()
        if name_or_path not in known:
            raise MixQuantError(
                f"unknown recipe {show(name_or_path)}; allowed: {', '.join(known)}, or the path to a YAML file "
                f"(with a {os.sep} in it or ending in .yaml){did_you_mean(nearest(name_or_path, known))}"
            )
        path = known[name_or_path]
    return _parse(name_or_path, str(path), _read(path))


def nearest(word: str, known: Collection[str], most: int = 1) -> list[str]:
    """At most ``most`` of ``known`` that look like ``word``, the nearest first; case does not count."""
    by_lower = {name.lower(): name for name in known}
    return [by_lower[low] for low in difflib.get_close_matches(word.lower(), by_lower, n=most)]


def did_you_mean(near: list[str]) -> str:
    """The end of an error message: ``; did you mean 'x'?``, or nothing where nothing is near."""
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def show(value: str) -> str:
    """A user's value for an error message: quoted, in one line, not longer than a line can bear."""
    short = value if len(value) <= 80 else value[:77] + "..."
    return f"'{short}'" if short.isprintable() else repr(short)  # repr would double the backslashes of a regex


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = did_you_mean(nearest(str(path), [*beside, *shipped()]))
        raise MixQuantError(f"{path}: no such file (relative to {Path.cwd()}){near}") from None
    except OSError as error:
        raise MixQuantError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise MixQuantError(f"{path}:{line}: byte {error.object[error.start]:#04x} is not UTF-8 text") from error


def _parse(name: str, file: str, text: str) -> Recipe:
    root = _Map.of(file, "", _compose(file, text), KEYS)
    root.require("version", "1")
    version = root.integer("version", 0)
    if version != 1:
        raise root.error("version", f"{version} is not a version that this release reads; allowed: 1")
    prefill = root.section("prefill", ("precision", "min_tokens", "fuse", "weights"))
    precision = prefill.choice("precision", PREFILL_PRECISIONS, "auto")
    layers = tuple(_rule(entry) for entry in root.entries("layers", ("match", "prefill", "decode", "optional")))
    protect = root.section("protect", ("last_prompt_token", "last_prompt_tokens"))
    if "last_prompt_tokens" in protect.nodes and not protect.boolean("last_prompt_token", True):
        raise protect.error("last_prompt_tokens", "asks for rows that last_prompt_token: false gives up")
    return Recipe(
        name=name,
        source=file,
        prefill=precision,
        min_tokens=prefill.integer("min_tokens", 1, least=1),
        fuse=prefill.boolean("fuse", True),
        decode=root.section("decode", ("precision",)).choice("precision", PRECISIONS, "bf16"),
        protect_last_prompt_token=protect.boolean("last_prompt_token", True),
        kernel=root.choice("kernel", KERNELS, "auto"),
        scales=root.section("weights", ("scales",)).choice("scales", SCALES, "search"),
        layers=layers,
        description=root.text("description"),
        verify=root.boolean("verify", True),
        protected_tail=protect.integer("last_prompt_tokens", 1, least=1),
        prefill_weights=_ready_made(prefill, precision, layers),
        prefill_weights_at=prefill.at("weights") if "weights" in prefill.nodes else "",
    )


def _ready_made(prefill: _Map, precision: str, layers: tuple[LayerRule, ...]) -> str:
    if "weights" not in prefill.nodes:
        return ""
    allowed = "; allowed: the folder of an NVFP4 checkpoint, or its name on the hub"
    asked = prefill.text("weights", allowed)
    if not asked:
        raise prefill.error("weights", f"is empty{allowed}")
    if not takes_ready_made(precision, layers):
        raise prefill.error("weights", f"holds NVFP4 weights, but prefill is {precision}; allowed with: auto, nvfp4")
    return asked


def takes_ready_made(prefill: str, layers: Collection[LayerRule]) -> bool:
    """Whether some layer may prefill in NVFP4, of which ready-made weights are."""
    return prefill in ("auto", "nvfp4") or any(rule.prefill == "nvfp4" for rule in layers)


def _rule(entry: _Map) -> LayerRule:
    allowed = f"an exact module name, or {REGEX} and a regular expression"
    entry.require("match", allowed)
    match = entry.text("match", f"; allowed: {allowed}")
    if match in ("", REGEX):
        raise entry.error("match", f"{show(match)} matches nothing in particular; allowed: {allowed}")
    if match.startswith(REGEX):
        try:
            re.compile(match.removeprefix(REGEX))
        except (re.error, OverflowError) as error:
            raise entry.error("match", f"{show(match)} is not a regular expression: {error}") from error
    if not {"prefill", "decode"} & entry.nodes.keys():
        raise entry.error("", "names no precision; allowed: prefill, decode, or both")
    phases = {
        phase: entry.choice(phase, PRECISIONS, "") if phase in entry.nodes else None for phase in ("prefill", "decode")
    }
    where = f"{entry.file}:{entry.line}"
    return LayerRule(match, phases["prefill"], phases["decode"], where, entry.boolean("optional", False))


def _compose(file: str, text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        parts = [part for part in (error.context, error.problem) if part]
        hint = "; write a regular expression in single quotes" if "escape character" in parts[-1] else ""
        raise MixQuantError(f"{file}{at}: not valid YAML: {', '.join(parts)}{hint}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # "\\UFFFFFFFF", a thousand brackets
        raise MixQuantError(f"{file}: not valid YAML: {error}") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        at = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise MixQuantError(f"{file}:{at}: not valid YAML: character {text[error.position]!a}") from error
    if node is None:
        raise MixQuantError(f"{file}:1: is empty; a recipe needs at least 'version: 1'")
    return node


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
class _Map:
    """One mapping of the file: only the keys it may have, each with its node; ``path`` is its dotted name."""

    file: str
    path: str
    line: int
    nodes: dict[str, yaml.Node]

    @classmethod
    def of(cls, file: str, path: str, node: yaml.Node, allowed: tuple[str, ...]) -> _Map:
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

    def section(self, key: str, allowed: tuple[str, ...]) -> _Map:
        if key not in self.nodes:
            return _Map(self.file, key, self.line, {})
        return _Map.of(self.file, key, self.nodes[key], allowed)

    def entries(self, key: str, allowed: tuple[str, ...]) -> Iterator[_Map]:
        node = self.nodes.get(key)
        if node is None:
            return
        if not isinstance(node, yaml.SequenceNode):
            raise self.error(key, f"must be a list, is {_kind(node)}; allowed: a list of {{{', '.join(allowed)}}}")
        for i, entry in enumerate(node.value):
            yield _Map.of(self.file, f"{key}[{i}]", entry, allowed)

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

    def integer(self, key: str, default: int, least: int | None = None) -> int:
        allowed = "; allowed: an integer" + (f" of at least {least}" if least is not None else "")
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
