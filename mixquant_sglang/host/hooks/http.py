"""The policy of an HTTP request, read before SGLang's model of the body drops what it does not know.

``/v1/responses``, ``/v1/messages``, Ollama's, ``/v1/embeddings`` and others have no ``custom_params``.  So one ASGI
layer in front of all routes reads the body that it hands on: a bad policy is a 400 on every route, streamed or not, and
a good one waits in a context variable for ``requests.check_request``, which sees every prompt's ``SamplingParams`` on
its way to the scheduler.  Context variables follow the tasks that SGLang makes for a request, in the background too.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from mixquant_sglang.host.hooks import launcher
from mixquant_sglang.host.hooks.registry import handler
from mixquant_sglang.recipe import policy
from mixquant_sglang.recipe.policy import PolicyError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_bf16: ContextVar[bool] = ContextVar("mixquant_bf16", default=False)


def asked_bf16() -> bool:
    """Whether the body of the HTTP request that is being answered asks for BF16 prefill."""
    return _bf16.get()


@handler
def read_policies(*_args: Any, **_kwargs: Any) -> None:
    add_layer()


def add_layer() -> None:
    """In a tokenizer worker too, whose app has built its layers when the arguments arrive, and is told to do it again
    before the first request."""
    from sglang.srt.entrypoints.http_server import app
    from starlette.middleware import Middleware

    if not any(layer.cls is PolicyLayer for layer in app.user_middleware):
        app.user_middleware.append(Middleware(PolicyLayer))  # innermost: behind decompression and authorization
        app.middleware_stack = None


class PolicyLayer:
    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._app(scope, _Guard(receive, send), send)
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["method"] not in ("POST", "PUT"):
            await self._answer(False, scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
            messages.append(await receive())
        parts = [message.get("body", b"") for message in messages]
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        asked = False
        if policy.concerns(body):
            types = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"content-type"]
            path = scope["path"].removeprefix(scope.get("root_path", ""))  # --fastapi-root-path
            try:
                asked = policy.body_asks_bf16(body, types[0] if types else "", path, launcher.asked_recipe())
            except PolicyError as error:
                await _refuse(send, str(error))
                return
        again = _Again(messages, receive)
        del messages, parts, body  # SGLang has its own copy while it answers
        await self._answer(asked, scope, again, send)

    async def _answer(self, asked: bool, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        token = _bf16.set(asked)  # always: uvicorn starts a pipelined request in the context of the one before it
        try:
            await self._app(scope, receive, send)
        finally:
            _bf16.reset(token)


class _Again:
    """``receive`` that gives what was read already once more."""

    def __init__(self, messages: list[Message], receive: Receive) -> None:
        self._messages = messages[::-1]
        self._receive = receive

    async def __call__(self) -> Message:
        return self._messages.pop() if self._messages else await self._receive()


class _Guard:
    """``receive`` of a web socket (/v1/realtime), whose messages have no place for a policy: closes it with 1008."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send

    async def __call__(self) -> Message:
        message = await self._receive()
        text = (message.get("text") or "").lower()
        if message["type"] == "websocket.receive" and "custom_params" in text and policy.KEY in text:
            reason = f"mixquant: a web socket has no custom_params.{policy.KEY}"
            await self._send({"type": "websocket.close", "code": 1008, "reason": reason})
            return {"type": "websocket.disconnect", "code": 1008}
        return message


async def _refuse(send: Send, message: str) -> None:
    """400 in the words of OpenAI's clients, Anthropic's and ``/generate``'s alike."""
    error = {"message": message, "type": "invalid_request_error", "param": f"custom_params.{policy.KEY}", "code": 400}
    body = json.dumps({"object": "error", "type": "error", "message": message, "code": 400, "error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
