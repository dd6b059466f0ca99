"""In processes that parse server arguments: the flag, the recipe, what is refused before anything starts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixquant_sglang import recipe
from mixquant_sglang.errors import MixQuantError, refusing
from mixquant_sglang.host import stock
from mixquant_sglang.host.hooks import registry
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.host.refusal import deterministic, gathers
from mixquant_sglang.host.refusals import check_server_args, refused_lines
from mixquant_sglang.recipe import Recipe, fingerprint, pairs
from mixquant_sglang.versions import machine
from mixquant_sglang.versions.dialect import dialect
from mixquant_sglang.versions.loading import cache_dtype, loads_dummy
from mixquant_sglang.weights.checkpoint import Source
from mixquant_sglang.weights.hub import find
from mixquant_sglang.weights.quantised import QuantisedCheckpoint
from mixquant_sglang.weights.quantised_config import FIELDS, check_recipe, check_said, family, said


@dataclass
class Asked:
    """What this process was asked for, as far as it parsed server arguments."""

    command_line: bool = False  # the arguments came from one, so a refusal ends the process with one line
    flags: dict[str, None] = field(default_factory=dict)  # those of ours that it had, in their order
    dtype: str | None = None
    moe_backend: str | None = None
    dummy: bool = False  # --load-format dummy
    cache_dtype: str = "auto"
    recipe: Recipe | None = None
    arrived: bool = False  # the recipe came with a launcher's arguments (``arrival.py``)
    noted: list[str] | None = None  # what ends the start, where all of it is asked for (mixquant doctor)


asked = Asked()
FLAGS = {"--mixquant-recipe": recipe.RECIPE_ENV, "--mixquant-min-tokens": recipe.MIN_TOKENS_ENV}


def note(lines: list[str]) -> None:
    """Forgets what was asked for, and has ``lines`` take what would end a start, all of it."""
    global asked
    asked = Asked(noted=lines)


class _Flag(argparse._StoreAction):  # of another kind SGLang takes nothing out of a --config file
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        asked.flags = {**asked.flags, self.option_strings[0]: None}
        os.environ[FLAGS[self.option_strings[0]]] = values
        setattr(namespace, self.dest, values)


@handler
def add_recipe_flag(_result: None, parser: argparse.ArgumentParser) -> None:
    asked.command_line = True
    parser.add_argument(
        "--mixquant-recipe",
        action=_Flag,
        metavar="NAME|FILE",
        help="Recipe for --quantization mixquant: a shipped name (mixquant recipes lists them) or a YAML file. "
        f"Default: the environment variable {recipe.RECIPE_ENV}, else 'auto'.",
    )
    parser.add_argument(
        "--mixquant-min-tokens",
        action=_Flag,
        metavar="N|auto",
        help="Prefill passes of fewer new tokens stay BF16, whatever the recipe says; auto: those for which that is "
        f"faster, by what is timed at the first start. Default: the environment variable {recipe.MIN_TOKENS_ENV}, else "
        "the recipe's min_tokens.",
    )


def _refusing() -> AbstractContextManager[None]:
    return refusing() if asked.command_line else nullcontext()


@handler
def resolve_server_args(original: Callable[..., None], server_args: Any, *args: Any, **kwargs: Any) -> None:
    if dialect().resolution_finished(server_args):
        return original(server_args, *args, **kwargs)
    ours = server_args.quantization == machine.NAME
    if ours and asked.arrived:  # a Ray actor of 0.5.17 makes another record of the resolved one
        _leave_draft(server_args)
        return original(server_args, *args, **kwargs)
    for name in machine.TOLD:
        os.environ.pop(name, None)
    with _refusing():
        if asked.flags and not ours:
            raise MixQuantError(f"{next(iter(asked.flags))} needs --quantization {machine.NAME}")
        if ours:
            with _noting():
                asked.recipe = recipe.load_requested()
            _check(server_args)
            _tell_deterministic(server_args)
            for hook in registry.hooks_of():
                if hook.process != "http":
                    registry.target_of(hook)
            asked.dtype = server_args.dtype
            asked.dummy, asked.cache_dtype = loads_dummy(server_args), cache_dtype(server_args)
            asked.moe_backend = getattr(server_args, "moe_runner_backend", None)
            _leave_draft(server_args)
            if gathers(server_args) and (asked.recipe is None or not asked.recipe.bf16_throughout):
                server_args.disable_prefill_cuda_graph = True  # of which a rank cannot do without alone
            _prepare_launcher()
        original(server_args, *args, **kwargs)
        if ours:
            _check(server_args)
            _tell_deterministic(dialect().resolved(server_args))
            if asked.noted is None and (asked.command_line or HTTP_SERVER in sys.modules):
                registry.set_hooks("http")  # imports SGLang's HTTP server, which comes next; sgl.Engine does without
            mode = str(dialect().resolved(server_args).disaggregation_mode)
            if mode in (pairs.PREFILL, pairs.DECODE):
                os.environ[machine.DISAGGREGATION_ENV] = mode
            if asked.recipe is not None:
                os.environ[machine.ASKED_ENV] = fingerprint.asked_digest(asked.recipe)
            os.environ[machine.ACTIVE_ENV] = "1"


@contextmanager
def _noting() -> Iterator[None]:
    try:
        yield
    except MixQuantError as error:
        if asked.noted is None:
            raise
        asked.noted.append(str(error))


def _leave_draft(server_args: Any) -> None:
    """SGLang would take our method for the draft too."""
    if server_args.speculative_draft_model_quantization is None:
        server_args.speculative_draft_model_quantization = "unquant"


def _tell_deterministic(args: Any) -> None:
    if deterministic(args):
        os.environ[machine.DETERMINISTIC_ENV] = "1"


def _check(server_args: Any) -> None:
    if asked.noted is None:
        check_server_args(server_args, asked.recipe)
    else:
        asked.noted += [line for line in refused_lines(server_args, asked.recipe) if line not in asked.noted]


HTTP_SERVER = "sglang.srt.entrypoints.http_server"


def _prepare_launcher() -> None:
    registry.set_hooks("asked")
    registry.check_hooks_took_effect("launcher")
    register_config()


def register_config() -> None:
    # Imported late: it needs SGLang's layers, which an idle plugin must not load.
    from mixquant_sglang.host import config

    config.register()


@handler
def check_checkpoint(model_config: Any) -> None:
    """Refuses quantised checkpoints, but for those that the recipe takes as they are, those of another dtype unless
    ``--dtype bfloat16`` asks for the cast, models that SGLang would not decode as stock, and ready-made prefill weights
    of another model."""
    if model_config.quantization != machine.NAME:
        return
    with _refusing():
        _take_quantised(model_config)
        stored = getattr(model_config.hf_text_config, "dtype", None)
        stored = getattr(torch, stored, stored) if isinstance(stored, str) else stored
        cast_unasked = stored is not torch.bfloat16 and asked.dtype == "auto"
        if model_config.dtype is not torch.bfloat16 or cast_unasked:
            raise MixQuantError(
                f"{model_config.model_path} is a {str(stored or torch.float32).removeprefix('torch.')} checkpoint that "
                f"would be served as {str(model_config.dtype).removeprefix('torch.')}; mixquant needs BF16: "
                "convert it, or pass --dtype bfloat16 to cast it at load"
            )
        stock.check_model(model_config, machine.device, asked.moe_backend)
        if asked.recipe is not None and asked.recipe.prefill_weights:
            from mixquant_sglang.weights.ready_made import ReadyMadeWeights

            ready = ReadyMadeWeights.open(asked.recipe.prefill_weights, asked.recipe.prefill_weights_at)
            ready.check_model(model_config.hf_text_config)


def _take_quantised(model_config: Any) -> None:
    """Of a quantised checkpoint that the recipe takes, SGLang is told our name in place of its format's: it builds
    ``MixQuantConfig`` of it, with the folder."""
    folder = Path(model_config.model_path)
    config = {**_fields(model_config.hf_config), "text_config": _fields(model_config.hf_text_config)}
    found = said(config, folder if folder.is_dir() else None, f"{model_config.model_path}: config.json")
    if found is None:
        if folder.is_dir():
            _check_said(folder)
        return
    chosen = asked.recipe or recipe.load_requested()
    where, quantization = found
    try:
        what = family(f"{model_config.model_path}: {where}", quantization)
    except MixQuantError as error:
        raise MixQuantError(
            f"{model_config.model_path} is already quantised ({quantization.get('quant_method')}); mixquant derives "
            f"its packed weights from a plain BF16 checkpoint: give it the original one ({error})"
        ) from None
    check_recipe(chosen, what, model_config.model_path)
    if asked.noted is None:  # the doctor downloads nothing
        folder = find(model_config.model_path, getattr(model_config, "revision", None))
    if folder.is_dir():
        QuantisedCheckpoint.open(folder).check_start(dummy=asked.dummy, cache_dtype=asked.cache_dtype)
    text = model_config.hf_text_config is model_config.hf_config
    model_config.hf_config = copy(model_config.hf_config)  # SGLang keeps one for all that ask, drafts among them
    model_config.hf_text_config = model_config.hf_config if text else copy(model_config.hf_text_config)
    for each in (model_config.hf_config, model_config.hf_text_config):
        for field_name in FIELDS:
            if getattr(each, field_name, None) is not None:
                setattr(each, field_name, None)
    model_config.hf_config.quantization_config = {"quant_method": machine.NAME, "checkpoint": str(folder)}


def _check_said(folder: Path) -> None:
    try:
        source = Source.open(folder)
    except MixQuantError:  # no safetensors, or only a config: whether that can be loaded, SGLang says
        return
    for name, stored in source.tensors.items():
        check_said(str(folder), name, stored.dtype)


def _fields(config: Any) -> dict[str, Any]:
    """What a model's config says of quantisation."""
    found: dict[str, Any] = {name: getattr(config, name, None) for name in FIELDS}
    return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in found.items()}


def asked_recipe() -> Recipe | None:
    """The recipe of the server that this process launches."""
    return asked.recipe
