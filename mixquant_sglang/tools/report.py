"""``mixquant doctor --report``: what a bug report needs, and nothing that should not leave the machine.

Left out: paths, addresses, host and user names, keys.  Of flags and environment variables the names are given, and a
value where it is a number, a switch, or one of the words that SGLang lists for the flag.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mixquant_sglang import __version__, recipe
from mixquant_sglang.errors import MixQuantError

_PACKAGES = ("sglang", "torch", "triton", "sglang-kernel", "flashinfer-python", "transformers", "safetensors", "ray")
_PLAIN = re.compile(r"-?\d+(\.\d+)?|true|false|on|off|none|null", re.IGNORECASE)
_VARIABLES = ("SGLANG_", "MIXQUANT_", "NCCL_", "FLASHINFER_", "CUDA_VISIBLE_DEVICES", "TORCHDYNAMO_", "TRITON_")
_DEVICES = ("cuda", "cpu", "xpu", "npu", "hpu")  # for which SGLang lists no words
HIDDEN = "(not shown)"


def run(wanted: str | None, launch: Sequence[str]) -> int:
    """Prints it; returns 0 if a server would start here, else 1."""
    lines, healthy = made(wanted or recipe.requested(), launch, os.environ)
    print("\n".join(lines))
    return 0 if healthy else 1


def made(asked: str, launch: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], bool]:
    """The lines of the report, and whether a server would start."""
    lines = [f"mixquant: {__version__}", f"Python: {platform.python_version()} ({platform.machine()})"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    lines += _device()
    said, healthy = _recipe(asked)
    lines += said
    names = sorted(name for name in environment if name.startswith(_VARIABLES))
    lines += [f"environment: {name}={shown(environment[name], ())}" for name in names]
    if launch:
        from mixquant_sglang.tools.launch import Command, ends

        command = Command(launch)
        lines += [f"flag: {flag}" for flag in flags(command.flags, choices())]
        found = ends(command)
        lines += [f"ends: {without_paths(line)}" for line in found]
        healthy = healthy and not found
    return lines, healthy


def _device() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["GPU: none"]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    each = [f"GPU: {p.name}, SM{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in found]
    return [*each, f"CUDA of torch: {torch.version.cuda}"]


def _recipe(asked: str) -> tuple[list[str], bool]:
    """What the recipe asks, field by field, and what it comes to here; of a file, not where it lies."""
    from mixquant_sglang.host import refusals
    from mixquant_sglang.recipe.fingerprint import fingerprint
    from mixquant_sglang.recipe.select import select
    from mixquant_sglang.versions import machine

    name = asked if asked in recipe.shipped() else "a file"
    try:
        loaded = recipe.load(asked)
        selection = select(loaded, machine.device())
        refusals.check_recipe(loaded, selection)
    except MixQuantError as error:
        return [f"recipe: {name}: refused: {without_paths(str(error))}"], False
    rules = [f"rule: {r.match} prefill {r.prefill} decode {r.decode} optional {r.optional}" for r in loaded.layers]
    fields = {"prefill": loaded.prefill, "decode": loaded.decode, "kernel": loaded.kernel, "fuse": loaded.fuse}
    fields |= {"min_tokens": loaded.min_tokens, "ready-made weights": bool(loaded.prefill_weights)}
    lines = [f"recipe: {name} ({', '.join(f'{key} {value}' for key, value in fields.items())})", *rules]
    lines.append(f"selection: {without_paths(selection.describe())}; because {without_paths(selection.reason)}")
    return [*lines, f"fingerprint: {fingerprint(loaded, selection)}"], True


def choices() -> dict[str, tuple[str, ...]]:
    """Of SGLang's flags: those that have words of their own, and these."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    return dict.fromkeys(("--device",), _DEVICES) | {
        flag: tuple(map(str, action.choices)) for action in parser._actions if action.choices for flag in _of(action)
    }


def _of(action: Any) -> list[str]:
    return [*action.option_strings]


def flags(words: Sequence[str], known: Mapping[str, Sequence[str]]) -> list[str]:
    """Each flag with what may be shown of its values."""
    out: list[str] = []
    flag = ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            allowed = known.get(flag, ())
            out.append(f"{flag} {shown(value, allowed)}" if equals else flag)
        elif out:
            out[-1] += f" {shown(word, known.get(flag, ()))}"
    return out


def shown(value: str, allowed: Sequence[str]) -> str:
    """``value`` where it can give nothing away."""
    plain = _PLAIN.fullmatch(value) or value in allowed or value in recipe.shipped() or value == "mixquant"
    return value if plain and len(value) < 24 else HIDDEN


def without_paths(text: str) -> str:
    """``text`` with what looks like a path, an address or a model's name on the hub taken out."""
    return re.sub(r"\b\w+://[^\s,;'\")]+|(?<!\w)[\w.~-]*/[^\s,;:'\")]+|\b\d+(\.\d+){3}\b", "PATH", text)
