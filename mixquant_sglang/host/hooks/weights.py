"""Weights that change while the server runs: taken whole or refused whole.

In memory (tensor, distributed, IPC): SGLang's own method runs first with a model that only takes down what it is given;
then every tensor is looked at (``weights/incoming.py``), the ranks agree, and only then are they loaded.  From disk:
the new checkpoint is read once before SGLang reads it.  Either way the packed copies are not used from the first write
until they are packed again (``weights/refresh.py``).
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import httpx
import torch
from safetensors import SafetensorError

from mixquant_sglang.errors import refusing
from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.versions.groups import stages
from mixquant_sglang.versions.updates import concerns_weights, ipc_without_post_hook, postprocess, read_weights
from mixquant_sglang.weights.arriving import Arriving, FromDisk
from mixquant_sglang.weights.incoming import SKIPPED
from mixquant_sglang.weights.quantised_config import check_said

logger = logging.getLogger(__name__)

# What SGLang's loaders, torch and the hub's client raise for what a client sent or a disk holds.
LOAD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError, httpx.HTTPError, pickle.PickleError, SafetensorError),
)
_OLD = "the old weights serve on"
_STAGES = (
    "mixquant: with --pp-size > 1 a stage writes new weights before the next one has heard of them, so a refusal by "
    f"one would leave the model with two versions; restart the server; {_OLD}"
)


# -- what was loaded at start ------------------------------------------------------------------------------------------


@handler
def read_checkpoint(original: Callable[..., Any], loader: Any, source: Any) -> Any:
    run = runtime.current()
    if run is None:
        return original(loader, source)
    if run.loading:  # the start
        return run.loaders_see(run.known.record(_said_to_be(run, source, original(loader, source))))
    disk = run.arriving.disk
    if disk is not None:
        disk.readings += 1
        if run.quantised is not None:
            run.quantised.forget()  # of a reading that broke off
        if disk.readings > 1:
            source = dataclasses.replace(source, model_or_path=disk.before)
        return run.loaders_see(original(loader, source))
    return original(loader, source)


def _said_to_be(
    run: Runtime, source: Any, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights``; ends the start at a quantised one of a checkpoint of which no config says that it is quantised."""
    for name, tensor in weights:
        if run.quantised is None:
            with refusing():
                check_said(str(source.model_or_path), name, str(tensor.dtype))
        yield name, tensor


# -- from disk ---------------------------------------------------------------------------------------------------------


@handler
def weights_from_disk(
    original: Callable[..., tuple[bool, str]],
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Callable[[str], bool] | None = None,
    **kwargs: Any,
) -> tuple[bool, str]:
    run = _served(updater)
    if run is None:
        return original(updater, model_path, load_format, weight_name_filter, **kwargs)
    if stages() > 1:
        return False, _STAGES
    if kwargs.get("recapture_cuda_graph") and run.weights.decodes_by_value:
        return False, (
            "mixquant: recapture_cuda_graph: SGLang captures decode graphs alone anew, which hold the tensor scales of "
            f"emulated NVFP4 by value, so they and prefill graphs would differ; leave it out; {_OLD}"
        )
    before = updater.model_config.model_path
    refused = run.weights.agree(_look_at(run, updater, model_path, load_format, weight_name_filter))
    if refused:
        return False, f"{model_path}: {refused}; {_OLD}"
    run.weights.hold(f"an update from {model_path} is being loaded")
    disk = run.arriving.disk = FromDisk(before)
    try:
        done, message = original(updater, model_path, load_format, weight_name_filter, **kwargs)
        broken = None
    except LOAD_ERRORS as error:
        done, message = False, f"{model_path}: {_said(error)}"
        broken = f"an update from {model_path} failed, and so did reading {before} again: {_said(error)}"
    finally:
        read, run.arriving.disk = disk.readings, None
    if not done:
        updater.model_config.model_path = before
    elsewhere = run.weights.agree(None if done else message)
    if done and elsewhere:  # another rank went back to the old checkpoint
        done, message, broken = _go_back(original, updater, before, load_format, elsewhere)
        read = 2
    broken = run.weights.agree(broken)
    if broken:
        run.weights.broken(broken)
        return False, message
    if not done and read > 1:
        message += f" mixquant: the weights are those of {before} again" + (
            ", without what was sent in memory since" if run.arriving.sent_since_disk else ""
        )
    run.arriving.sent_since_disk = False if read else run.arriving.sent_since_disk
    run.weights.written()
    return done, _with_packing(run, message)


def _look_at(
    run: Runtime, updater: Any, model_path: str, load_format: str, keep: Callable[[str], bool] | None
) -> str | None:
    """Why the checkpoint is refused; None if it is not, or if SGLang itself will not load this format."""
    try:
        weights = read_weights(updater, model_path, load_format)
        if weights is None:
            return None
        seen, numbers = set(), []
        for name, tensor in weights:
            if keep is not None and not keep(name):
                continue
            seen.add(name)
            if name not in run.known.tensors and SKIPPED.fullmatch(name):
                continue
            if problem := run.known.problem(name, tensor, torch.device(updater.device)):
                return problem
            if tensor.numel() == 1:
                numbers.append((name, tensor.clone()))
        problem = run.known.missing(seen) if keep is None else run.known.torn(seen)
        return problem or run.known.differing(numbers)
    except LOAD_ERRORS as error:
        return _said(error)


def _go_back(
    original: Callable[..., tuple[bool, str]], updater: Any, before: str, load_format: str, why: str
) -> tuple[bool, str, str | None]:
    try:
        done, message = original(updater, before, load_format)
    except LOAD_ERRORS as error:
        done, message = False, _said(error)
    return False, why, None if done else f"reading {before} again failed: {message}"


# -- in memory ---------------------------------------------------------------------------------------------------------


@handler
def weights_from_tensor(
    original: Callable[..., tuple[bool, str]],
    updater: Any,
    named_tensors: Any,
    load_format: str | None = None,
) -> tuple[bool, str]:
    if _served(updater) is not None and load_format in updater.custom_weight_loaders:
        return False, (
            f"mixquant: load_format {load_format}: custom weight loaders write past the check of new weights; send the "
            f"checkpoint's tensors with load_format null or flattened_bucket; {_OLD}"
        )
    return _in_memory(lambda: original(updater, named_tensors, load_format), updater)


@handler
def weights_from_distributed(
    original: Callable[..., tuple[bool, str]], updater: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    return _in_memory(lambda: original(updater, *args, **kwargs), updater)


@handler
def weights_from_ipc(original: Callable[..., tuple[bool, str]], updater: Any, recv_req: Any) -> tuple[bool, str]:
    """The sender fills one buffer again and again: what arrives is kept in host memory until all of it is there."""
    return _in_memory(lambda: original(updater, recv_req), updater, keep=True)


@handler
def weights_direct(original: Callable[..., None], model: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    run = runtime.current()
    if run is None or run.arriving.direct is None:
        return original(model, named_tensors)
    run.arriving.direct.append((original, named_tensors))
    return None


def _in_memory(call: Callable[[], tuple[bool, str]], updater: Any, *, keep: bool = False) -> tuple[bool, str]:
    run = _served(updater)
    if run is None:
        return call()
    if stages() > 1:
        return False, _STAGES
    model, device = updater.get_model(), torch.device(updater.device)
    try:
        with _taken_down(run.arriving, model, keep=keep) as (loads, direct):
            done, message = call()
        parameters = dict(model.named_parameters()) if direct else {}
        found = [run.known.problem(*named, device) for named in loads]
        found += [run.known.problem_of_parameter(*named, parameters) for _, each in direct for named in each]
        if not run.weights.in_session:
            found.append(run.known.torn({name for name, _ in loads}))
        found.append(run.known.differing(loads))
        problem = None if done else message
        problem = problem or next(filter(None, found), None)
    except LOAD_ERRORS as error:
        problem = _said(error)
    problem = run.weights.agree(problem)
    if problem:
        return False, f"{problem}; {_OLD}"
    run.arriving.sent_since_disk = True
    if run.quantised is not None and not run.weights.in_session:
        run.quantised.forget()
    run.weights.hold("an update in memory is being loaded")
    try:
        if loads:
            # Of tensors in host memory one at a time: beside weights and KV a GPU has no room for all.
            moved = ((name, tensor.to(device)) for name, tensor in loads) if keep else loads
            model.load_weights(run.loaders_see(moved))
        for original, named in direct:
            original(model, named)
        if keep:
            postprocess(model)
    except LOAD_ERRORS as error:
        problem = f"an update failed while it was written, and the old weights are gone: {_said(error)}"
    problem = run.weights.agree(problem)
    if problem:
        run.weights.broken(problem)
        return False, problem
    run.weights.written()
    return True, _with_packing(run, message) if keep else message


@contextmanager
def _taken_down(
    arriving: Arriving, model: Any, *, keep: bool
) -> Iterator[tuple[list[tuple[str, torch.Tensor]], list[tuple[Any, list[tuple[str, torch.Tensor]]]]]]:
    """While it is open, ``model`` loads nothing: its tensors are in the first list, direct ones in the second."""
    loads: list[tuple[str, torch.Tensor]] = []
    direct: list[tuple[Any, list[tuple[str, torch.Tensor]]]] = []

    def take_down(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        loads.extend((name, tensor.to("cpu", copy=True) if keep else tensor) for name, tensor in weights)

    own = vars(model).get("load_weights")  # SGLang's FlashRL loader sets one
    arriving.direct, model.load_weights = direct, take_down
    try:
        with ipc_without_post_hook() if keep else nullcontext():
            yield loads, direct
    finally:
        arriving.direct = None
        if own is None:
            del model.load_weights
        else:
            model.load_weights = own


# -- sessions (0.5.23), and memory that is released --------------------------------------------------------------------


@handler
def weights_begin(updater: Any) -> None:
    if (run := _served(updater)) is not None:
        run.weights.begin()
        if run.quantised is not None:
            run.quantised.forget()


@handler
def weights_end(_result: None, updater: Any, **_kwargs: Any) -> None:
    """SGLang's answer is made elsewhere (``session_ended``)."""
    if (run := _served(updater)) is not None:
        failed = run.weights.end()
        if run.quantised is not None and (module := run.quantised.begun):
            run.quantised.forget()
            failed = f"only parts of {module} arrived, which is multiplied out to BF16"
            run.weights.broken(failed)
        if run.weights.mixed is not None:
            logger.error(
                "mixquant: a weight update ended that could not be packed whole, and all else is as it brought it: %s; "
                "send these again, whole",
                run.weights.mixed,
            )
        run.arriving.session_failed = failed


@handler
def session_ended(original: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
    """Of a session that wrote what cannot be packed, which SGLang would call a success."""
    run = runtime.current()
    if run is not None:
        run.arriving.session_failed = None
    answer = original(manager, recv_req)
    if run is not None and answer.success and (failed := run.arriving.session_failed) is not None:
        answer.success = run.weights.mixed is None  # else BF16 weights are all new
        said = f"mixquant: {run.weights.mixed or failed}; passes run {run.weights.meanwhile}"
        answer.message = f"{answer.message} {said}" if answer.success else said
    return answer


@handler
def weights_released(_result: Any, _manager: Any, recv_req: Any) -> None:
    if (run := runtime.current()) is not None and concerns_weights(recv_req):
        run.weights.hold("the memory of the weights is released")


@handler
def weights_resumed(_result: Any, _manager: Any, recv_req: Any) -> None:
    if (run := runtime.current()) is not None and concerns_weights(recv_req):
        run.weights.changed()


def _served(updater: Any) -> Runtime | None:
    """The runtime; None for what SGLang updates of a draft, which is its own."""
    return runtime.serving(updater.get_model_runner())


def _with_packing(run: Runtime, message: str) -> str:
    failed = run.weights.refresh()
    return f"{message} mixquant: {failed}; passes run {run.weights.meanwhile}" if failed else message


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
