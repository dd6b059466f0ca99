"""A request's policy, and the cache namespace of its KV, in the process that takes requests and in the schedulers."""

from __future__ import annotations

from typing import Any

from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks import http, launcher
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.recipe import pairs, policy
from mixquant_sglang.recipe.policy import PolicyError
from mixquant_sglang.versions import machine, storage
from mixquant_sglang.versions.dialect import dialect


@handler
def check_request(_result: None, sampling_params: Any, *_args: Any) -> None:
    """Raises ``PolicyError`` for a bad policy; hands on one that the HTTP body had and SGLang's model of it dropped.

    And for several samples on a server of a pair: ``TokenizerManager._handle_batch_request`` gives all of a prompt, and
    the pass that caches it before, one bootstrap room, which moves one request's KV, so that no answer ever comes."""
    if machine.disaggregation() and sampling_params.n > 1:
        raise PolicyError(
            f"n is {policy.show(sampling_params.n)}; allowed on a prefill/decode pair: 1, since SGLang moves keys and "
            "values once a prompt and would never answer; send one request a sample"
        )
    recipe = launcher.asked_recipe()
    if not policy.asks_bf16(sampling_params.custom_params, recipe) and http.asked_bf16():
        sampling_params.custom_params = {**(sampling_params.custom_params or {}), policy.KEY: dict(policy.ALLOWED)}


@handler
def namespace_request(_result: None, req: Any, *_args: Any, **_kwargs: Any) -> None:
    """Names the request's KV by what makes it; answers 400 to a bad policy, for what comes here unverified (gRPC)."""
    run = runtime.current()
    req.mixquant_bf16 = False
    if run is None:
        return
    try:
        req.mixquant_bf16 = policy.asks_bf16(req.sampling_params.custom_params, run.recipe)
    except PolicyError as error:
        req.set_finish_with_abort(str(error))
    req.mixquant_prompt = _prompt_tokens(run, req)
    fingerprint = policy.BF16 if req.mixquant_bf16 else run.fingerprint
    req.extra_key = policy.kv_name(fingerprint, req.extra_key)


def _prompt_tokens(run: Runtime, req: Any) -> int | None:
    """How many of the tokens sent are prompt, where a decode server says so; None where all are."""
    custom = req.sampling_params.custom_params
    if run.pair is None or run.pair.mode != pairs.PREFILL or not isinstance(custom, dict) or pairs.PROMPT not in custom:
        return None
    told, sent = custom[pairs.PROMPT], len(req.origin_input_ids)
    if isinstance(told, bool) or not isinstance(told, int) or not 0 < told <= sent:
        req.set_finish_with_abort(f"custom_params.{pairs.PROMPT} is {policy.show(told)}; allowed: 1 to {sent}")
        return None
    return told


@handler
def session_turn(req: Any, session: Any, *_args: Any, **_kwargs: Any) -> None:
    """Answers 400 to a turn of a streaming session whose policy is not that of its last turn: a streaming session keeps
    its KV outside of the radix cache, under its id alone."""
    if not session.streaming or req.to_finish is not None:
        return
    for node in session.req_nodes.values():  # the last turn that succeeded; this one is not in there yet
        if node.req.mixquant_bf16 != req.mixquant_bf16:
            kept, asked = ("BF16" if r.mixquant_bf16 else "the server's precision" for r in (node.req, req))
            req.set_finish_with_abort(
                f"custom_params.{policy.KEY}: the streaming session keeps KV of turns prefilled in {kept}, and this "
                f"turn asks for {asked}; keep to one policy, or open another session"
            )


@handler
def rebootstrap_payload(payload: dict[str, Any], req: Any) -> None:
    """What a decode server sends to have a prompt and what was generated prefilled again: with the policy, with the
    length of the prompt, and without our name on the key, to which the prefill server puts its own."""
    payload["extra_key"] = policy.client_key(payload["extra_key"])
    custom: dict[str, Any] = {pairs.PROMPT: len(req.origin_input_ids)}
    if req.mixquant_bf16:
        custom[policy.KEY] = dict(policy.ALLOWED)
    payload["sampling_params"]["custom_params"] = custom


@handler
def attach_storage(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses a store that outlives the process where its pages are named by their tokens alone."""
    if dialect().stored_pages_are_named():
        return original(scheduler, *args, **kwargs)
    return storage.refused_storage(f"mixquant: {storage.UNNAMED_PAGES}")
