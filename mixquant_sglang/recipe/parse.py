"""Reads a recipe, and refuses what it cannot mean.

A recipe is a small YAML file, shipped (``configs/``, asked for by name) or the user's (asked for by path). Nothing in
it is guessed: an unknown key, a wrong type or a pattern that does not compile ends in one line that says where, what is
allowed and which name is nearest. Lines come from the YAML nodes, and a node's text is read here and never constructed,
so YAML's surprises (``off`` is a boolean, ``012`` is ten, ``!!python/...``) become errors and not values.

Which rule applies to which module: ``recipe/matching.py``. Whether this GPU can run a precision: not decided here.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import yaml

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.recipe.schema import (
    ATTENTION,
    ATTENTION_FROM,
    DEFAULT,
    KERNELS,
    KEYS,
    MIN_TOKENS_ENV,
    PRECISIONS,
    PREFILL_KEYS,
    PREFILL_PRECISIONS,
    RECIPE_ENV,
    REGEX,
    ROUNDINGS,
    SCALES,
    LayerRule,
    Recipe,
    takes_ready_made,
)
from mixquant_sglang.recipe.text import did_you_mean, nearest, show
from mixquant_sglang.recipe.yaml_map import YamlMap


def requested() -> str:
    """The recipe that the environment asks for, else the default; an empty variable counts as unset."""
    return os.environ.get(RECIPE_ENV) or DEFAULT


def load_requested(name: str = "") -> Recipe:
    """The recipe ``name``, or that the environment asks for, with the ``min_tokens`` that the environment asks for;
    raises ``MixQuantError``."""
    return with_min_tokens(load(name or requested()), os.environ.get(MIN_TOKENS_ENV, ""))


def with_min_tokens(asked: Recipe, text: str) -> Recipe:
    """``asked`` with another ``min_tokens``: an integer of at least 1, or ``auto``; as it is for ""."""
    if not text:
        return asked
    where = f"{MIN_TOKENS_ENV} (--mixquant-min-tokens)"
    if text != "auto" and not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise MixQuantError(f"{where} is {show(text)}; allowed: an integer of at least 1 or auto")
    return replace(asked, min_tokens=None if text == "auto" else int(text), min_tokens_by=where)


def shipped() -> dict[str, Path]:
    """The recipes of this package: name -> file, in alphabetical order."""
    here = Path(__file__).resolve().parent.parent
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
    root = YamlMap.of(file, "", _compose(file, text), KEYS)
    root.require("version", "1")
    version = root.integer("version", 0)
    if version != 1:
        raise root.error("version", f"{version} is not a version that this release reads; allowed: 1")
    prefill = root.section("prefill", PREFILL_KEYS)
    precision = prefill.choice("precision", PREFILL_PRECISIONS, "auto")
    layers = tuple(_rule(entry) for entry in root.entries("layers", ("match", "prefill", "decode", "optional")))
    protect = root.section("protect", ("last_prompt_token", "last_prompt_tokens"))
    if "last_prompt_tokens" in protect.nodes and not protect.boolean("last_prompt_token", True):
        raise protect.error("last_prompt_tokens", "asks for rows that last_prompt_token: false gives up")
    return Recipe(
        name=name,
        source=file,
        prefill=precision,
        min_tokens=prefill.auto_or_integer("min_tokens", 1),
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
        prefill_rounding=_rounding(prefill),
        attention=_attention(prefill, precision),
        attention_from=prefill.integer("attention_from", ATTENTION_FROM, least=16),
    )


def _attention(prefill: YamlMap, precision: str) -> str:
    asked = prefill.choice("attention", ATTENTION, "bf16")
    if asked != "bf16" and precision == "bf16":
        raise prefill.error("attention", f"is {asked} where precision is bf16; allowed with: auto, fp8, nvfp4")
    if asked == "bf16" and "attention_from" in prefill.nodes:
        raise prefill.error("attention_from", "says from where on attention is low, and attention is bf16")
    return asked


def _ready_made(prefill: YamlMap, precision: str, layers: tuple[LayerRule, ...]) -> str:
    if "weights" not in prefill.nodes:
        return ""
    allowed = "; allowed: the folder of an NVFP4 checkpoint, or its name on the hub"
    asked = prefill.text("weights", allowed)
    if not asked:
        raise prefill.error("weights", f"is empty{allowed}")
    if not takes_ready_made(precision, layers):
        raise prefill.error("weights", f"holds NVFP4 weights, but prefill is {precision}; allowed with: auto, nvfp4")
    return asked


def _rounding(prefill: YamlMap) -> str:
    if "rounding" in prefill.nodes and "weights" not in prefill.nodes:
        raise prefill.error("rounding", "is that of ready-made weights; allowed with: weights")
    return prefill.choice("rounding", ROUNDINGS, "nearest")


def _rule(entry: YamlMap) -> LayerRule:
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
