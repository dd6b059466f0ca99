"""Whether a launch command would start: parsed and resolved as SGLang does it, with nothing started.

Every line that would end it is wanted, not the first; what refuses is what refuses in a server.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.tools import starting
from mixquant_sglang.weights.json_file import read_object
from mixquant_sglang.weights.quantised_config import said

# What SGLang's own parsing and resolution, and transformers' of a config, raise for what they do not take.
_ENDS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError),
    StrictDataclassError,
)
FLAGS = {"--mixquant-recipe": recipe.RECIPE_ENV, "--mixquant-min-tokens": recipe.MIN_TOKENS_ENV}
_COMMON = "--mixquant-"
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_LANGUAGE_MODELS = ("auto", "llm")  # what ``sglang serve --model-type`` calls them
_PRINTS = "it prints something (help, a version) and ends"

# Stands for the model of a command that names none: a small dense one.
_MODEL: dict[str, Any] = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", "head_dim": 128},
    **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    **{"num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6},
}


class Command:
    """``words``: ``A=B python -m sglang.launch_server FLAGS``, ``sglang serve [MODEL] FLAGS``, or the flags alone;
    a whole command may be one word, and behind others (``env A=B``)."""

    def __init__(self, words: Sequence[str]) -> None:
        rest = split(words)
        self.environment: dict[str, str] = {}
        while rest and _ASSIGNMENT.match(rest[0]):
            self._assign(rest.pop(0))
        whole = bool(rest) and not rest[0].startswith("-")
        if whole:
            end = next((i for i in range(len(rest)) if _serves(rest, i)), None)
            if end is None:
                raise MixQuantError(
                    f"{' '.join(rest[:3])} ... is no launch command; allowed: python -m sglang.launch_server FLAGS, "
                    "sglang serve FLAGS, or FLAGS"
                )
            for word in filter(_ASSIGNMENT.match, rest[:end]):
                self._assign(word)
            served, rest = rest[end] == "serve", rest[end + 1 :]
            if served:
                rest = _as_served(rest)
        self.notes: list[str] = []
        self.typed = tuple(rest)  # the flags as they are
        self.flags = rest
        if not self._has("--quantization"):
            self.flags += ["--quantization", "mixquant"]
            if whole:
                self.notes.append("the command has no --quantization mixquant: asked with it")

    def _assign(self, word: str) -> None:
        name, _, value = word.partition("=")
        self.environment[name] = value

    def _has(self, *flags: str) -> bool:
        """Whether the command, or the file that its ``--config`` names, has one of them."""
        return any(word.partition("=")[0] in flags for word in (*self.flags, *_configured(self.flags)))

    def sets(self) -> dict[str, str]:
        """The variables that a server would have of the command: its assignments, then ours by flags, as they are
        parsed: those of a ``--config`` file before those of the command line."""
        found = dict(self.environment)
        for name, value in _given(self.flags):
            for flag, variable in FLAGS.items():
                if flag.startswith(name) and len(name) > len(_COMMON):  # argparse takes its beginning for it
                    found[variable] = value
        return found

    def stand_in(self, folder: Path) -> None:
        """Gives a command without a model one."""
        if not self._has("--model-path", "--model"):
            (folder / "config.json").write_text(json.dumps(_MODEL))
            self.flags = ["--model-path", str(folder), *self.flags]
            self.notes.append("no --model-path: asked for a small dense Qwen3")


def split(words: Sequence[str]) -> list[str]:
    """The words of a command that may be one word, quoted."""
    with contextlib.suppress(ValueError):  # a quote without its end
        if len(words) == 1 and any(c.isspace() for c in words[0]):
            return shlex.split(words[0])
    return [*words]


def _serves(words: Sequence[str], i: int) -> bool:
    """Whether the flags begin behind word ``i``."""
    by = Path(words[i - 1]).name if i else ""
    return words[i] == "sglang.launch_server" or (words[i] == "serve" and by in ("sglang", "sglang.cli.main"))


def _as_served(words: Sequence[str]) -> list[str]:
    """The flags that ``sglang serve`` hands on: the model may come first, and without a flag."""
    flags = [*words]
    if flags and not flags[0].startswith("-"):
        flags.insert(0, "--model-path")
    for kind in _LANGUAGE_MODELS:
        if f"--model-type={kind}" in flags:
            flags.remove(f"--model-type={kind}")
        for i, pair in enumerate(pairwise(flags)):
            if pair == ("--model-type", kind):
                del flags[i : i + 2]
                break
    return flags


def _configured(flags: Sequence[str]) -> list[str]:
    """The flags that a file sets, ``--flag=value``; none where SGLang will say what is wrong with it.
    ``--config=FILE`` is ignored by SGLang."""
    try:
        found = yaml.safe_load(Path(flags[flags.index("--config") + 1]).read_text())
    except (ValueError, IndexError, OSError, yaml.YAMLError):
        return []
    return [f"--{key}".replace("_", "-") + f"={found[key]}" for key in found] if isinstance(found, dict) else []


def ends(command: Command) -> list[str]:
    """The lines that would end it; none where it starts.  Changes this process as a launch would."""
    with tempfile.TemporaryDirectory() as folder, _environment(command.environment), _quiet():
        command.stand_in(Path(folder))
        return _ends(command.flags, command.notes)


def _ends(flags: Sequence[str], notes: list[str]) -> list[str]:
    from sglang.srt.plugins import load_plugins

    from mixquant_sglang.host.hooks import launcher

    # without a GPU SGLang's resolution makes defaults that are another machine's
    if line := starting.no_gpu(dict(_given(flags)).get("--device")):
        return [line]
    load_plugins()
    noted: list[str] = []
    launcher.note(noted)
    server_args = None
    with _caught(noted, flags):
        server_args = _resolve(flags)
    if server_args is not None:
        if server_args.quantization != "mixquant":
            return [f"--quantization {server_args.quantization}: a server without mixquant"]
        lora_paths = [*(server_args.lora_paths or ())]
        with _caught(noted, flags):
            noted += starting.lines(server_args, lora_paths)
        with _caught(noted, flags):
            server_args.check_server_args()  # as the engine does behind the resolution; it starts nothing
        with _caught(noted, flags):
            noted += _check_layers(server_args, _check_model(server_args), notes)
    _check_recipe(noted)
    return list(dict.fromkeys(noted))


@contextlib.contextmanager
def _caught(noted: list[str], flags: Sequence[str]) -> Iterator[None]:
    """Notes the line with which SGLang, or we, would end the start."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as error:
        line = error.code if isinstance(error.code, str) else (printed.getvalue().strip().splitlines() or [_PRINTS])[-1]
        noted.append(line.removeprefix("mixquant: ").removeprefix("sglang serve: "))
    except MixQuantError as error:
        noted.append(str(error))
    except (*_ENDS, ValueError) as error:
        noted.append(_misshapen(flags) or f"SGLang: {' '.join(str(error).split()) or type(error).__name__}")


def _given(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each flag with the word behind it, those of a ``--config`` file before those of the command line."""
    words = [*_configured(flags), *flags]
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        yield name, value if equals else "".join(words[at + 1 : at + 2])


def _misshapen(flags: Sequence[str]) -> str:
    """What is wrong with a local checkpoint's quantisation config, at whose shape transformers fails; else empty."""
    for flag, value in zip(flags, [*flags[1:], ""], strict=True):
        file = Path(value, "config.json")
        if flag in ("--model-path", "--model") and file.is_file():
            try:
                said(read_object(file), file.parent, str(file))
            except MixQuantError as error:
                return str(error)
    return ""


def _resolve(flags: Sequence[str]) -> Any:
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args([*flags])
    if hasattr(server_args, "resolve_once"):  # 0.5.17 resolves as it constructs
        server_args.resolve_once()
    return server_args


def _check_model(server_args: Any) -> Any:
    """The checkpoint, which SGLang looks at once it builds its model config."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig.from_server_args(server_args)


def _check_layers(server_args: Any, model_config: Any, notes: list[str]) -> list[str]:
    """The linears, which SGLang asks for once it builds the model, of a checkpoint that says more than its config."""
    from mixquant_sglang.recipe.select import select
    from mixquant_sglang.tools import layers
    from mixquant_sglang.versions import machine
    from mixquant_sglang.versions.dialect import dialect

    args, folder = dialect().resolved(server_args), Path(model_config.model_path)
    said = getattr(model_config.hf_config, "quantization_config", None)
    quantised = isinstance(said, dict) and said.get("quant_method") == machine.NAME
    try:
        loaded = recipe.load_requested()
        selection = select(loaded, machine.device())
    except MixQuantError:  # ``_check_recipe`` says so
        return []
    if not (quantised or loaded.prefill_weights):
        return []
    try:
        if not folder.is_dir():
            raise MixQuantError(f"{folder} is not here, and nothing is downloaded")
        if model_config.hf_text_config is not model_config.hf_config:
            raise MixQuantError("a model of several modalities")
        return layers.ends(folder, quantised, loaded, selection, (args.tp_size, args.ep_size))
    except MixQuantError as error:
        notes.append(f"linears were not asked for one by one: {error}")
        return []


def _check_recipe(noted: list[str]) -> None:
    """What the recipe comes to on this machine."""
    from mixquant_sglang.host import refusals
    from mixquant_sglang.recipe.select import select
    from mixquant_sglang.versions import machine

    try:
        loaded = recipe.load_requested()
        refusals.check_recipe(loaded, select(loaded, machine.device()))
    except MixQuantError as error:
        noted.append(str(error))


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without SGLang's log lines, which say what a server does."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
