"""What a request may ask of us, and the cache namespace that it gets."""

from __future__ import annotations

from typing import Any

from mixquant_sglang.hooks import launcher
from mixquant_sglang.hooks.table import handler

REQUEST_KEY = "mixquant"


@handler
def check_request(_result: None, sampling_params: Any, *_args: Any) -> None:
    """Raises ``ValueError``, which SGLang answers with 400, for a bad ``custom_params.mixquant``."""
    custom = sampling_params.custom_params
    if not isinstance(custom, dict) or REQUEST_KEY not in custom:
        return
    policy = custom[REQUEST_KEY]
    if policy != {"prefill": "bf16"}:
        raise ValueError(
            f"custom_params.{REQUEST_KEY} is {policy!r}; "
            "allowed: {'prefill': 'bf16'}, which prefills this request in BF16"
        )
    asked = launcher.asked_recipe()
    if asked is not None and asked.decode != "bf16":
        raise ValueError(
            f"custom_params.{REQUEST_KEY}: this server's recipe {asked.name} has decode {asked.decode}, "
            "so it has no BF16 path for a request's prefill"
        )


@handler
def namespace_request(_result: None, req: Any, *_args: Any, **_kwargs: Any) -> None:
    custom = req.sampling_params.custom_params
    req.mixquant_bf16 = isinstance(custom, dict) and REQUEST_KEY in custom
    if req.mixquant_bf16:
        req.extra_key = f"{req.extra_key or ''}|mixquant=bf16"
