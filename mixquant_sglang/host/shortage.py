"""What a server that ran out of memory says: what its recipe takes of each GPU, and what would fit."""

from __future__ import annotations

from typing import Any

import torch

from mixquant_sglang.errors import MixQuantError
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.versions import machine
from mixquant_sglang.versions.dialect import dialect
from mixquant_sglang.versions.groups import stages
from mixquant_sglang.weights import footprint


def explain(run: Runtime, model_runner: Any) -> str:
    """One line, computed from the model's config alone; where that is not possible it says why."""
    args = dialect().resolved(model_runner.server_args)
    if stages() > 1:
        held = run.packed_weight_bytes / 1e9
        return f"packed weights of this stage hold {held:.1f} GB; fewer low layers or more stages take less"
    ranks = args.tp_size, args.ep_size
    try:
        config = model_runner.model_config.hf_config.to_dict()
        return footprint.shortage(config, run.recipe, machine.device(), _memory(model_runner.device), *ranks)
    except MixQuantError as error:
        held = run.packed_weight_bytes / 1e9
        return f"packed weights hold {held:.1f} GB; what would fit is not known ({error})"


def _memory(device: str) -> float:
    """Bytes of the GPU or, on a CPU, of the machine."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return machine.memory()
