"""Weights that change while the server runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def read_weights(updater: Any, model_path: str, load_format: str) -> Any | None:
    """The tensors that ``WeightUpdater.update_weights_from_disk`` would read; None where it refuses the format."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    loader = get_model_loader(LoadConfig(load_format=load_format), updater.model_config)
    if not isinstance(loader, DefaultModelLoader):
        return None
    source = DefaultModelLoader.Source.init_new(updater.model_config, updater.get_model())
    return loader._get_weights_iterator(dataclasses.replace(source, model_or_path=model_path))


def concerns_weights(recv_req: Any) -> bool:
    """Whether a request to release or resume memory is about that of the weights."""
    return not recv_req.tags or "weights" in recv_req.tags


@contextmanager
def ipc_without_post_hook() -> Iterator[None]:
    """SGLang's update by IPC (``checkpoint_engine_worker``) loads what it is given and leaves ``postprocess`` out: of
    the old weights, which are prepared already, layers need not bear it (experts that are shuffled in place)."""
    try:
        from sglang.srt.checkpoint_engine.checkpoint_engine_worker import SGLangCheckpointEngineWorkerExtensionImpl
    except ImportError:  # SGLang's answer says so
        yield
        return
    own = SGLangCheckpointEngineWorkerExtensionImpl.get_post_hook
    SGLangCheckpointEngineWorkerExtensionImpl.get_post_hook = lambda _: lambda: None
    try:
        yield
    finally:
        SGLangCheckpointEngineWorkerExtensionImpl.get_post_hook = own


def postprocess(model: Any) -> None:
    """What SGLang does after it loaded weights by IPC (``checkpoint_engine_worker``), whose errors it only logs."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    if hasattr(model, "post_load_weights"):
        model.post_load_weights()
