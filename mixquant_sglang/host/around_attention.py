"""What may take the place of SGLang's own in prefill attention and before it: seen before the KV cache is sized,
installed once there is an attention back end."""

from __future__ import annotations

from typing import Any

import torch

from mixquant_sglang.host.gathering import install_gathering, prepare_gathering
from mixquant_sglang.host.low_attention import install_low_attention, prepare_low_attention
from mixquant_sglang.host.norm_rope import install_norm_rope, prepare_norm_rope
from mixquant_sglang.host.runtime import Runtime


def prepare_around_attention(run: Runtime, model_runner: Any, device: torch.device) -> None:
    prepare_norm_rope(run, model_runner, device)
    prepare_gathering(run, model_runner, device)
    prepare_low_attention(run, model_runner, device)


def install_around_attention(run: Runtime, backend: Any) -> None:
    """In the order in which they are wrapped around each other."""
    install_norm_rope(run, backend)
    install_gathering(run, backend)
    install_low_attention(run, backend)
