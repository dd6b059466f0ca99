"""A server that knows the soak's answers and counts rows as mixquant does, over HTTP, in this process; or not quite.

A token is a character.  ``spoil`` changes what is sent: a function of (number of the request, right answer) to a text,
or None for a connection that is closed without an answer; ``miscount``: rows that request 20 is counted for and did not
run, by (phase, precision).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from aiohttp import web

from scripts.load.problems import Agent, first

SIMPLE = ("/update_weights_from_disk", "/pause_generation", "/continue_generation", "/close_session", "/abort_request")


class SoakServer:
    def __init__(
        self,
        agents: list[Agent],
        spoil: Callable[[int, str], str | None] = lambda _, right: right,
        miscount: dict[tuple[str, str], int] | None = None,
    ) -> None:
        self.answers = {
            first(agent, question): question.right for agent in agents for question in (*agent.asks, agent.walk)
        }
        self.spoil, self.requests, self.protected = spoil, 0, 0
        self.tokens = {("prefill", "nvfp4"): 0, ("prefill", "bf16"): 0, ("decode", "bf16"): 0}
        self.miscount = miscount or {}
        self.sessions: dict[str, str] = {}
        self.busy = 0
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/open_session", self.open_session)
        app.router.add_post("/flush_cache", self.flush)
        app.router.add_get("/server_info", self.info)
        app.router.add_get("/metrics", self.metrics)
        for path in SIMPLE:
            app.router.add_post(path, self.simple)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        self.url = ""

    async def __aenter__(self) -> SoakServer:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    # -- what it counts ---

    def state(self) -> dict[str, Any]:
        tokens: dict[str, dict[str, int]] = {"prefill": {}, "decode": {}}
        for (phase, precision), n in self.tokens.items():
            tokens[phase][precision] = n
        precision = {"prefill": "nvfp4", "decode": "bf16"}
        return {"tokens": tokens, "protected_rows": self.protected, "precision": precision}

    async def info(self, _request: web.Request) -> web.Response:
        return web.json_response({"internal_states": [{"mixquant": self.state()}]})

    async def metrics(self, _request: web.Request) -> web.Response:
        lines = [
            f'mixquant:forward_tokens_total{{phase="{phase}",precision="{precision}",tp_rank="0"}} {float(n)}'
            for (phase, precision), n in self.tokens.items()
        ]
        return web.Response(
            text="\n".join([*lines, f'mixquant:protected_rows_total{{tp_rank="0"}} {self.protected}.0'])
        )

    async def flush(self, _request: web.Request) -> web.Response:
        return web.Response(status=400 if self.busy else 200)

    async def simple(self, request: web.Request) -> web.Response:
        # SGLang ends where it cannot, and its scheduler may hold what it has answered for a step.
        if request.path == "/update_weights_from_disk" and (await request.json()).get("flush_cache", True):
            return web.Response(status=500, text="Cache flush failed after updating weights")
        return web.json_response({"success": True})

    async def open_session(self, _request: web.Request) -> web.Response:
        name = f"session-{len(self.sessions)}"
        self.sessions[name] = ""
        return web.json_response(name)

    # -- what it answers ---

    def right(self, asked: str) -> str:
        """``asked``: a conversation; the records stand in its first turn, the key in its last."""
        turns = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", asked, re.DOTALL)
        if turns[-1] in self.answers:
            return self.answers[turns[-1]]
        key = re.search(r"Value of (\d+)\?", turns[-1])
        assert key
        found = re.search(f"^({key[1]}=\\d+)$", turns[0], re.MULTILINE)
        assert found
        return found[1]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.text())
            asked = str(body["text"])
            assert asked.startswith(("<|im_start|>", "\n"))
        except (ValueError, KeyError, TypeError, AssertionError):
            said = await request.text()
            return web.json_response({"error": {"message": why(said)}}, status=400)
        session = body.get("session_params")
        if session:
            asked = self.sessions[session["id"]] + asked
        answer, meta = await self.run(asked, body)
        if answer is None:
            return self.hang_up(request)
        if session:
            self.sessions[session["id"]] = f"{asked}{answer}<|im_end|>"
        whole = {"text": answer, "meta_info": meta}
        if not body.get("stream"):
            return web.json_response(whole)
        return await self.stream(
            request, [{"text": answer[:3], "meta_info": {**meta, "completion_tokens": 3, "finish_reason": None}}, whole]
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.text())
            messages = body["messages"]
            asked = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            assert messages[0]["content"] != "hi"
        except (ValueError, KeyError, TypeError, IndexError, AssertionError):
            said = await request.text()
            return web.json_response({"error": {"message": why(said)}}, status=400)
        answer, meta = await self.run(asked, body)
        if answer is None:
            return self.hang_up(request)
        usage = {"prompt_tokens": meta["prompt_tokens"], "completion_tokens": meta["completion_tokens"]}
        if not body.get("stream"):
            choice = {"message": {"content": answer}, "finish_reason": "stop"}
            return web.json_response({"choices": [choice], "usage": usage})
        part = {"choices": [{"delta": {"content": answer[:3]}}], "usage": {**usage, "completion_tokens": 3}}
        rest = {"choices": [{"delta": {"content": answer[3:]}, "finish_reason": "stop"}], "usage": usage}
        return await self.stream(request, [part, rest])

    async def run(self, asked: str, body: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        self.busy += 1
        number, self.requests = self.requests, self.requests + 1
        try:
            right = self.right(asked)
            answer = self.spoil(number, right)
            new, generated = len(asked), len(answer or "")
            bf16 = "custom_params" in body
            self.tokens["prefill", "nvfp4"] += 0 if bf16 else new - 1
            self.tokens["prefill", "bf16"] += new if bf16 else 1
            self.protected += new if bf16 else 1
            self.tokens["decode", "bf16"] += max(0, generated - 1)
            for key, rows in self.miscount.items() if number == 20 else ():
                self.tokens[key] = self.tokens.get(key, 0) + rows
            await asyncio.sleep(0.01)
        finally:
            self.busy -= 1
        meta = {"prompt_tokens": new, "cached_tokens": 0, "completion_tokens": generated, "num_retractions": 0}
        return answer, {**meta, "finish_reason": {"type": "stop"}}

    async def stream(self, request: web.Request, events: list[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        sent = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        try:
            for i in range(0, len(sent), 37):  # cut anywhere
                await response.write(sent[i : i + 37])
        except ConnectionError:
            pass
        return response

    @staticmethod
    def hang_up(request: web.Request) -> web.Response:
        assert request.transport
        request.transport.close()
        return web.Response()


def why(said: str) -> str:
    """Words that the soak looks for in the answers to malformed bodies."""
    return f"{said[-40:]}: max_new_tokens, temperature; custom_params is 7; allowed: {{'prefill': 'bf16'}}"
