"""A prefill and a decode server: what they say to each other, and what does not fit is refused request by request.

SGLang's decode server asks a prefill server's registry for its ranks when the first request names it, and again when it
was away.  There ours is asked what it is.  A pair that does not fit ends each of its requests with 500 and the reason;
both servers serve on, since who names a prefill server is the client or its router.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import requests

from mixquant_sglang.host import runtime
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.host.runtime import Runtime
from mixquant_sglang.recipe import pairs
from mixquant_sglang.versions import bootstrap, storage

logger = logging.getLogger(__name__)


@handler
def open_registry(_result: None, registry: Any) -> None:
    """In the process that takes a prefill server's requests."""
    bootstrap.add_path(registry)


@handler
def say_what_we_are(manager: Any) -> None:
    """Before a prefill server's ranks are registered, so that nobody finds them and not this."""
    run = runtime.current()
    if run is None or run.pair is None or not bootstrap.is_first_rank(manager):
        return
    url = bootstrap.registry_of(manager)
    bootstrap.say(url, _identity(run).to_json())
    run.weights.on_change = lambda: _say_again(run, url)


def _say_again(run: Runtime, url: str) -> None:
    """The weights are no longer those that were loaded: they are not compared any more."""
    assert run.pair is not None
    if run.pair.weights:
        run.pair.forget_weights()
        try:
            bootstrap.say(url, _identity(run).to_json(), tries=1)
        except requests.RequestException as error:
            logger.warning("mixquant: decode servers will compare weights with those at start: %s", error)


def _identity(run: Runtime) -> pairs.Identity:
    assert run.pair is not None
    return pairs.identity(run.pair.asked, run.fingerprint, model=run.pair.model, weights=run.pair.weights)


@handler
def check_pair(original: Callable[..., bool], manager: Any, bootstrap_addr: str) -> bool:
    """Whether the prefill server can be asked for keys and values; what it is is asked once for each time that SGLang
    asks for its ranks."""
    if not original(manager, bootstrap_addr):
        return False
    run = runtime.current()
    if run is None or run.pair is None:
        return True
    found = manager.prefill_info_table[bootstrap_addr]
    known, _ = run.pair.said.get(bootstrap_addr, (None, ""))
    if known is found:
        return True
    try:
        theirs = pairs.Identity.from_json(bootstrap.ask(bootstrap_addr))
    except (requests.RequestException, ValueError) as error:
        logger.warning("mixquant: the prefill server at %s does not say what it is: %s", bootstrap_addr, error)
        del manager.prefill_info_table[bootstrap_addr]  # SGLang asks again, some times
        return False
    verdict = _verdict(run, manager, theirs) or ""
    run.pair.said[bootstrap_addr] = found, verdict
    if verdict:
        logger.error("mixquant: requests to the prefill server at %s are refused: %s", bootstrap_addr, verdict)
    else:
        logger.info("mixquant: the prefill server at %s fits", bootstrap_addr)
    return True


def _verdict(run: Runtime, manager: Any, theirs: pairs.Identity | None) -> str | None:
    assert run.pair is not None
    # A sample of weights is of a first rank's; the other ranks fail with it.
    weights = run.pair.weights if bootstrap.is_first_rank(manager) else ""
    ours = pairs.identity(run.pair.asked, run.fingerprint, model=run.pair.model, weights=weights)
    shared, kept = storage.decode_server_keeps(manager.server_args)
    verdict = pairs.misfit(ours, theirs, run.fingerprint if shared else run.pair.kept)
    if verdict is None and theirs is not None and kept:
        run.pair.kept = theirs.fingerprint
    return verdict


@handler
def refuse_pair(_result: None, receiver: Any, *_args: Any, **_kwargs: Any) -> None:
    """Once the prefill server is known, so that it is told too and does not wait for its time to run out."""
    run = runtime.current()
    if run is None or run.pair is None:
        return
    _, verdict = run.pair.said.get(receiver.bootstrap_addr, (None, ""))
    if verdict:
        receiver.abort()
        receiver.kv_mgr.record_failure(receiver.bootstrap_room, f"mixquant: {verdict}")
