"""Requests of a soak over HTTP: /generate and /v1/chat/completions, streamed or not, cut or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

BF16 = {"mixquant": {"prefill": "bf16"}}
LIMIT_S = 240.0  # of one request: what takes longer is lost
FAILURES = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError, TimeoutError)


@dataclass
class Reply:
    """``status`` 0: no answer came.  ``finish``: "stop", "length", "abort", or "" where it did not end.  ``cached`` and
    ``retractions`` are None where they are not told."""

    status: int = 0
    text: str = ""
    prompt: int = 0
    cached: int | None = None
    generated: int = 0
    retractions: int | None = None
    finish: str = ""
    error: str = ""
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def whole(self) -> bool:
        return self.status == 200 and self.finish in ("stop", "length") and not self.error

    def take(self, event: dict[str, Any]) -> None:
        """One event of a stream, or the whole answer, of either endpoint."""
        if "error" in event and "meta_info" not in event:
            said = event["error"]
            self.error = str(said.get("message", said) if isinstance(said, dict) else said) or "error"
            return
        if "meta_info" in event:
            meta = event["meta_info"]
            self.text = event.get("text", self.text)
            self.prompt, self.generated = meta.get("prompt_tokens", 0), meta.get("completion_tokens", 0)
            self.cached = meta.get("cached_tokens")
            self.retractions = meta.get("num_retractions", 0)
            finish = meta.get("finish_reason")
            if finish:
                self.finish = finish["type"]
                if self.finish == "abort":
                    self.error = str(finish.get("message") or "abort")
            return
        for choice in event.get("choices") or []:
            said = choice.get("delta") or choice.get("message") or {}
            self.text += said.get("content") or ""
            self.finish = choice.get("finish_reason") or self.finish
        usage = event.get("usage")
        if usage:
            self.prompt, self.generated = usage["prompt_tokens"], usage["completion_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            self.cached = details.get("cached_tokens", 0)


def generate_body(
    text: str, most: int, *, bf16: bool = False, rid: str | None = None, session: dict[str, Any] | None = None
) -> dict[str, Any]:
    body: dict[str, Any] = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": most}}
    if bf16:
        body["custom_params"] = BF16
    if rid:
        body["rid"] = rid
    if session:
        body["session_params"] = session
    return body


def chat_body(
    turns: list[tuple[str, str]], question: str, most: int, *, bf16: bool = False, rid: str | None = None
) -> dict[str, Any]:
    messages = []
    for text, answer in turns:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": question})
    body: dict[str, Any] = {"model": "soak", "messages": messages, "temperature": 0, "max_tokens": most}
    if bf16:
        body["custom_params"] = BF16
    if rid:
        body["rid"] = rid
    return body


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Of a stream; what is no event, as a router's error in JSON, comes as one.

    mini_lb sends the decode server's bytes on as they come, so a line may be cut anywhere.
    """
    rest = b""
    async for data in response.content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            event = parsed(line)
            if event is not None:
                yield event
    event = parsed(rest)
    if event is not None:
        yield event


def parsed(line: bytes) -> dict[str, Any] | None:
    line = line.strip().removeprefix(b"data:").strip()
    if not line or line == b"[DONE]":
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return {"error": line.decode(errors="replace")[:300]}
    return found if isinstance(found, dict) else {"error": str(found)[:300]}


class Client:
    """One for the whole soak.  ``async with Client(url) as client``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=LIMIT_S)
        # A connection for each request: the server that comes back is a new one, and a closed one is a disconnect.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session
        await self._session.close()

    @property
    def http(self) -> aiohttp.ClientSession:
        assert self._session
        return self._session

    async def ask(self, path: str, body: dict[str, Any], *, stream: bool = False, cut_after: int = -1) -> Reply:
        """``cut_after``: the connection is closed once so many new tokens have come (only if streamed); -1: never."""
        reply = Reply()
        if stream:
            body = {**body, "stream": True}
            if path.startswith("/v1/"):
                body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        try:
            async with self.http.post(self.url + path, json=body) as response:
                reply.status = response.status
                if stream and response.status == 200:
                    async for event in events(response):
                        reply.take(event)
                        if 0 <= cut_after <= reply.generated:
                            break
                else:
                    await self._whole(response, reply)
        except FAILURES as error:
            reply.error = reply.error or f"{type(error).__name__}: {error}"
        reply.ended = time.monotonic()
        return reply

    @staticmethod
    async def _whole(response: aiohttp.ClientResponse, reply: Reply) -> None:
        text = await response.text(errors="replace")
        try:
            event = json.loads(text)
        except ValueError:
            event = {"error": text[:300]}
        if response.status != 200:
            said = event.get("error", event) if isinstance(event, dict) else event
            said = said.get("message", said) if isinstance(said, dict) else said
            if isinstance(event, dict) and isinstance(event.get("message"), str):
                said = event["message"]
            reply.error = str(said)[:300] or f"status {response.status}"
        else:
            reply.take(event)

    async def leave(self, path: str, body: dict[str, Any], after_s: float) -> Reply:
        """A request whose client is gone after ``after_s``; the reply, if it was faster."""
        asked = asyncio.create_task(self.ask(path, body))
        done, _ = await asyncio.wait([asked], timeout=after_s)
        if done:
            return asked.result()
        asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asked
        return Reply(ended=time.monotonic())

    async def post(
        self, url: str, body: Any = None, *, raw: str | None = None, timeout: float = 120
    ) -> tuple[int, str]:
        """Status and text; 0 and the error where there is no answer."""
        data = raw if raw is not None else json.dumps(body if body is not None else {})
        try:
            async with self.http.post(
                url,
                data=data.encode(),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as response:
                return response.status, await response.text(errors="replace")
        except FAILURES as error:
            return 0, f"{type(error).__name__}: {error}"

    async def get(self, url: str, timeout: float = 60) -> tuple[int, str]:
        try:
            async with self.http.get(url, timeout=aiohttp.ClientTimeout(total=timeout)) as response:
                return response.status, await response.text(errors="replace")
        except FAILURES as error:
            return 0, f"{type(error).__name__}: {error}"
