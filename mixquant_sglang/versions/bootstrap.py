"""Where a prefill server says what it is: the registry of its ranks that decode servers ask (``disaggregation``)."""

from __future__ import annotations

import time
from typing import Any

import requests

PATH = "/mixquant"
_ANSWER_S = 5  # as SGLang's own questions


def registry_of(manager: Any) -> str:
    """The URL of the registry that a prefill server's ``CommonKVManager`` registers with."""
    from sglang.srt.utils.network import NetworkAddress

    if manager.dist_init_addr:
        host = NetworkAddress.parse(manager.dist_init_addr).resolved().host
    else:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(manager.bootstrap_host, manager.bootstrap_host)
    return str(NetworkAddress(host, manager.bootstrap_port).to_url())


def is_first_rank(manager: Any) -> bool:
    ranks = (manager.attn_tp_rank, manager.attn_cp_rank, manager.attn_dp_rank, manager.pp_rank, manager.system_dp_rank)
    return not any(ranks)


def say(url: str, facts: dict[str, str], *, tries: int = 30) -> None:
    """Leaves ``facts`` at the registry, one try a second; raises ``requests.RequestException`` if it takes nothing."""
    for left in reversed(range(tries)):
        try:
            requests.put(url + PATH, json=facts, timeout=_ANSWER_S).raise_for_status()
            return
        except requests.RequestException:
            if not left:
                raise
        time.sleep(1)


def ask(address: str) -> Any:
    """What a prefill server's registry at ``address`` (host:port) was told; None where it does not know the path, as
    without mixquant.  Raises ``requests.RequestException`` where it does not answer."""
    answer = requests.get(f"http://{address}{PATH}", timeout=_ANSWER_S)
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    return answer.json()


def add_path(registry: Any) -> None:
    """Gives SGLang's ``CommonKVBootstrapServer`` the path: PUT leaves JSON there, GET answers it."""
    from aiohttp import web

    told: dict[str, Any] = {}

    async def put(request: web.Request) -> web.Response:
        told["facts"] = await request.json()
        return web.Response(text="OK")

    async def get(_request: web.Request) -> web.Response:
        if "facts" not in told:
            return web.json_response({"error": "the prefill server has not said yet what it is"}, status=503)
        return web.json_response(told["facts"])

    app: web.Application = registry.app
    app.router.add_put(PATH, put)
    app.router.add_get(PATH, get)
