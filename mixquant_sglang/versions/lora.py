"""LoRA: which linears SGLang wraps, so that adapters see their whole BF16 input and result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mixquant_sglang.versions.dialect import dialect


def takes_adapters(server_args: Any) -> bool:
    resolved = dialect().resolved(server_args)
    return any(getattr(resolved, name, None) for name in ("enable_lora", "lora_paths"))


def targets(server_args: Any) -> frozenset[str] | None:
    """Last parts of the names of modules that may be wrapped, as ``LoRAManager.init_lora_shapes`` finds them from
    ``--lora-target-modules``; None where adapters decide, for any."""
    named = dialect().resolved(server_args).lora_target_modules
    if not named or isinstance(named, str) or "all" in named:
        return None
    from sglang.srt.lora.utils import get_normalized_target_modules

    return frozenset(name.rpartition(".")[2] for name in get_normalized_target_modules(named))


def wrapped(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and linear of each that SGLang wrapped."""
    from sglang.srt.lora.layers import BaseLayerWithLoRA

    for name, module in model.named_modules():
        if isinstance(module, BaseLayerWithLoRA):
            yield name, module.base_layer
