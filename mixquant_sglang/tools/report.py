"""``mixquant doctor --report``: what a bug report needs, and nothing that should not leave the machine.

Left out: paths, addresses, host and user names, keys.  Of flags the names are given that SGLang knows, and a value
where it is a number and the flag takes one, or one of the words that SGLang lists for the flag; of environment
variables the names, and numbers and switches.  What messages quote of all else is taken out of them (``hidden.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from mixquant_sglang import __version__, recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools.hidden import MASK, Hidden, is_secret

if TYPE_CHECKING:
    from mixquant_sglang.tools.launch import Command

_PACKAGES = ("sglang", "torch", "triton", "sglang-kernel", "flashinfer-python", "transformers", "safetensors", "ray")
_NUMBER = re.compile(r"-?\d{1,9}(\.\d{1,6})?[kKmM]?")
_SWITCH = re.compile(r"true|false|on|off|yes|no|none|null", re.IGNORECASE)
_VARIABLES = ("SGLANG_", "MIXQUANT_", "NCCL_", "FLASHINFER_", "CUDA_VISIBLE_DEVICES", "TORCHDYNAMO_", "TRITON_")
_TEXT = 100_000  # characters of a file that are looked at


@dataclass(frozen=True)
class Takes:
    """What of a flag's values may be shown: these words, and numbers if it takes such."""

    words: tuple[str, ...] = ()
    numbers: bool = False


# Flags for which SGLang lists no words, and ours.
_WORDS = {
    "--device": ("cuda", "cpu", "xpu", "npu", "hpu"),
    "--model-impl": ("auto", "sglang", "transformers", "mindspore"),
    "--quantization": ("mixquant",),
    "--speculative-algorithm": ("NGRAM", "STANDALONE", "EAGLE", "EAGLE3", "NEXTN"),
}


def run(wanted: str | None, launch: Sequence[str]) -> int:
    """Prints it; returns 0 if a server would start here, else 1."""
    sys.excepthook = _say_the_kind_alone
    with _silence():
        lines, healthy = made(wanted, launch, os.environ)
    print("\n".join(lines))
    return 0 if healthy else 1


def made(wanted: str | None, launch: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], bool]:
    """The lines of the report, and whether a server would start.  Recipe and variables are those that the command
    would have a server have: its flags go before ``wanted`` (``--recipe``), that before its assignments."""
    known = flags_of_sglang()
    hidden = Hidden()
    hidden.add_environment(environment)
    launch = _words(launch)
    command, refused = _command(launch)
    if command is not None:
        if wanted:
            command.environment[recipe.RECIPE_ENV] = wanted
        environment = {**environment, **command.sets()}
        wanted = None
    asked = wanted or environment.get(recipe.RECIPE_ENV) or recipe.DEFAULT
    hidden.add_all(word for word in typed(launch, known) if word not in recipe.shipped())
    for file in ({asked}, *(named(launch, name) for name in ("--config", "--mixquant-recipe", recipe.RECIPE_ENV))):
        for path in file - {*recipe.shipped()}:
            hidden.add(path)
            hidden.add_words(_text_of(path))
    lines = [f"mixquant: {__version__}", f"Python: {platform.python_version()} ({platform.machine()})"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    lines += _device()
    said, healthy = _recipe(asked, environment.get(recipe.MIN_TOKENS_ENV, ""), hidden)
    lines += said
    lines += variables(environment)
    if launch:
        found = [refused]
        if command is not None:
            from mixquant_sglang.tools.launch import ends

            lines += [f"flag: {flag}" for flag in flags(command.typed, known)]
            lines += [f"note: {note}" for note in command.notes]
            found = ends(command)
        lines += [f"ends: {hidden.out_of(line)}" for line in found]
        healthy = healthy and not found
    return lines, healthy


def _device() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["GPU: none"]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    each = [f"GPU: {p.name}, SM{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in found]
    return [*each, f"CUDA of torch: {torch.version.cuda}"]


def _recipe(asked: str, min_tokens: str, hidden: Hidden) -> tuple[list[str], bool]:
    """What the recipe asks, field by field, and what it comes to here; of a file, not where it lies."""
    from mixquant_sglang.host import refusals
    from mixquant_sglang.recipe.fingerprint import fingerprint
    from mixquant_sglang.recipe.select import select
    from mixquant_sglang.versions import machine

    name = asked if asked in recipe.shipped() else "a file"
    try:
        loaded = recipe.with_min_tokens(recipe.load(asked), min_tokens)
        selection = select(loaded, machine.device())
        refusals.check_recipe(loaded, selection)
    except MixQuantError as error:
        return [f"recipe: {name}: refused: {hidden.out_of(str(error))}"], False
    rules = [
        f"rule: {hidden.out_of(r.match)} prefill {r.prefill} decode {r.decode} optional {r.optional}"
        for r in loaded.layers
    ]
    fields = {"prefill": loaded.prefill, "decode": loaded.decode, "kernel": loaded.kernel, "fuse": loaded.fuse}
    fields |= {"min_tokens": loaded.min_tokens or "auto", "ready-made weights": bool(loaded.prefill_weights)}
    if loaded.prefill_rounding != "nearest":
        fields |= {"rounding": loaded.prefill_rounding}
    lines = [f"recipe: {name} ({', '.join(f'{key} {value}' for key, value in fields.items())})", *rules]
    lines.append(f"selection: {hidden.out_of(selection.describe())}; because {hidden.out_of(selection.reason)}")
    return [*lines, f"fingerprint: {fingerprint(loaded, selection)}"], True


def _words(launch: Sequence[str]) -> list[str]:
    from mixquant_sglang.tools.launch import split

    return split(launch)


def _command(launch: Sequence[str]) -> tuple[Command | None, str]:
    """The launch command, or why it is none; neither where there is no word."""
    from mixquant_sglang.tools.launch import Command

    try:
        return (Command(launch) if launch else None), ""
    except MixQuantError as error:
        return None, str(error)


def flags_of_sglang() -> dict[str, Takes]:
    """SGLang's flags and what may be shown of their values."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    known = {
        "--mixquant-recipe": Takes(tuple(recipe.shipped())),
        "--mixquant-min-tokens": Takes(("auto",), True),
    }
    for action in parser._actions:
        words = tuple(map(str, action.choices or ()))
        number = action.type in (int, float) or getattr(action.type, "__name__", "").endswith("_int")
        for flag in action.option_strings:
            known[flag] = Takes(words + _WORDS.get(flag, ()), number)
    return known


def flags(launch: Sequence[str], known: Mapping[str, Takes]) -> list[str]:
    """Each flag with what may be shown of its values."""
    return [" ".join(shown) for shown, _ in _split(launch, known)]


def typed(launch: Sequence[str], known: Mapping[str, Takes]) -> list[str]:
    """The words, and the values in them, of which ``flags`` shows nothing."""
    return [word for _, hidden in _split(launch, known, whole=True) for word in hidden]


def _split(
    launch: Sequence[str], known: Mapping[str, Takes], whole: bool = False
) -> Iterator[tuple[list[str], list[str]]]:
    """By flag: what is shown, and what is not; ``whole``: what stands before the first flag, too."""
    shown, hidden, flag = [""], list[str](), ""
    for word in launch:
        name, equals, value = word.partition("=")
        if word.startswith("-") and not _NUMBER.fullmatch(word):
            if flag or (whole and hidden):
                yield shown, hidden
            flag, hidden = _flag(name, known), []
            shown = [flag or f"a flag that SGLang does not have: {MASK}"]
            if not flag:
                hidden, flag = [name, name.lstrip("-")], " "
            if not equals:
                continue
        elif flag:
            value = word
        else:
            hidden += [word, value] if equals else [word]
            continue
        may = _may_be_shown(value, known.get(flag, Takes()))
        shown.append(value if may else MASK)
        hidden += [] if may else [value, *value.split("=")[1:]]
    if flag or (whole and hidden):
        yield shown, hidden


def _flag(name: str, known: Mapping[str, Takes]) -> str:
    """The flag that ``name`` is, or begins and is the only one to, as argparse has it; "" if none."""
    if name in known:
        return name
    longer = [flag for flag in known if name.startswith("--") and len(name) > 2 and flag.startswith(name)]
    return longer[0] if len(longer) == 1 else ""


def _may_be_shown(value: str, takes: Takes) -> bool:
    return value in takes.words or (takes.numbers and _NUMBER.fullmatch(value) is not None)


def variables(environment: Mapping[str, str]) -> list[str]:
    """The lines of environment variables that matter here."""
    names = sorted(name for name in environment if name.startswith(_VARIABLES) and re.fullmatch(r"[A-Z0-9_]+", name))
    return [f"environment: {name}={_value(name, environment[name])}" for name in names]


def _value(name: str, value: str) -> str:
    if name == recipe.RECIPE_ENV and value in recipe.shipped():
        return value
    plain = _NUMBER.fullmatch(value) or _SWITCH.fullmatch(value)
    return value if plain and not is_secret(name) else MASK


def named(launch: Sequence[str], flag: str) -> set[str]:
    """The values of ``flag``, or of an environment variable that is set in front."""
    follows = {word for at, word in enumerate(launch) if at and launch[at - 1] == flag}
    return follows | {word.partition("=")[2] for word in launch if word.startswith(f"{flag}=")}


def _text_of(path: str) -> str:
    """The beginning of a file that the user wrote, "" if there is none: messages quote it."""
    try:
        with Path(path).expanduser().open(errors="replace") as file:
            return file.read(_TEXT)
    except (OSError, ValueError):
        return ""


def _say_the_kind_alone(kind: type[BaseException], _error: BaseException, _trace: TracebackType | None) -> None:
    """A traceback has paths, and an error's text may be anything."""
    print(f"mixquant: no report: {kind.__name__}; without --report it says more", file=sys.stderr)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what SGLang prints, logs and warns of meanwhile, which names files and hosts."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(logging.NOTSET)
