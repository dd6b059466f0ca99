"""The server that a public benchmark asks: its OpenAI chat endpoint, what it says of itself, its tokenizer.

The server is one that the user has started.  ``connect`` refuses, in one line, an address where nobody answers, a key
that is missing or wrong, and a model that is not served.  A server of SGLang also says its version, quantization and
mixquant recipe (``/server_info``); these belong to the identity of a run, so that two arms never share a file.

``seed`` travels with each request and numbers the sample.  SGLang draws by it with ``--enable-deterministic-inference``
only; otherwise samples of different seeds are simply different draws.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai


class Stop(Exception):
    """What ends a run, as the one line that the user reads."""


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.  ``top_k`` 0 and ``thinking`` None are left out: not every endpoint knows them."""

    max_tokens: int | None
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    thinking: bool | None = True
    extra_body: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Sampling:
        try:
            extra = json.loads(args.extra_body)
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise Stop(f"--extra-body {args.extra_body}: not a JSON object")
        return cls(args.max_tokens, args.temperature, args.top_p, args.top_k, args.thinking, extra)

    def body(self) -> dict[str, Any]:
        body = dict(self.extra_body)
        if self.top_k:
            body["top_k"] = self.top_k
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking, **body.get("chat_template_kwargs", {})}
        return body

    def __str__(self) -> str:
        thinking = {True: ", thinking", False: ", no thinking", None: ""}[self.thinking]
        extra = f", {json.dumps(self.extra_body)}" if self.extra_body else ""
        drawn = f"T {self.temperature:g}, top-p {self.top_p:g}, top-k {self.top_k or 'off'}"
        return f"{drawn if self.temperature else 'greedy'}, at most {self.max_tokens} tokens{thinking}{extra}"


def key_from(env: str | None, flag: str) -> str:
    """The API key in the environment variable ``env``; a server of one's own needs none."""
    if env is None:
        return "EMPTY"
    if not os.environ.get(env):
        raise Stop(f"{flag} {env}: that environment variable is not set")
    return os.environ[env]


def reason(error: openai.APIError) -> str:
    """What an endpoint or a connection says, short."""
    text = str(error.__cause__ or error.message).strip().splitlines() or [""]
    body = error.body if isinstance(error, openai.APIStatusError) else None
    if isinstance(body, dict):
        inner = body.get("error")
        text = str(body.get("message") or (isinstance(inner, dict) and inner.get("message")) or text[0]).splitlines()
    return " ".join(text[0].split())[:400]


class Server:
    """One endpoint.  ``flags``: how its address, model and key are named on the command line."""

    def __init__(
        self,
        url: str,
        model: str | None,
        key_env: str | None,
        timeout: float = 6000,
        flags: tuple[str, str, str] = ("--base-url", "--model", "--api-key-env"),
    ) -> None:
        self.flags = flags
        self.root = url.rstrip("/").removesuffix("/v1")
        self.key = key_from(key_env, flags[2])
        self.timeout = timeout
        self.model = self._served(model)
        self.client = openai.AsyncOpenAI(base_url=f"{self.root}/v1", api_key=self.key, timeout=timeout, max_retries=5)

    def _served(self, model: str | None) -> str:
        url, name, key = self.flags
        try:
            with openai.OpenAI(base_url=f"{self.root}/v1", api_key=self.key, timeout=60, max_retries=1) as client:
                served = [entry.id for entry in client.models.list()]
        except openai.NotFoundError:  # some endpoints list no models
            served = []
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Stop(f"{self.root} refuses the key ({reason(error)}): name its variable with {key}") from None
        except openai.APIError as error:
            raise Stop(
                f"no server answers at {self.root} ({reason(error)}): start one, or name it with {url}"
            ) from None
        except (AttributeError, TypeError, ValueError):
            raise Stop(f"{self.root} is no OpenAI endpoint: name one with {url}") from None
        if model is None and len(served) != 1:
            raise Stop(
                f"{self.root} serves {', '.join(served[:5]) or 'models that it does not list'}: choose with {name}"
            )
        if model and served and model not in served:
            raise Stop(f"{name} {model}: not served by {self.root}, which serves {', '.join(served[:5])}")
        return model or served[0]

    def identity(self) -> dict[str, Any]:
        """What decides the numbers: SGLang's version and quantization, the recipe of mixquant by its name and by the
        fingerprint of all that it says; nothing for others."""
        try:
            headers = {"Authorization": f"Bearer {self.key}"}
            info = httpx.get(f"{self.root}/server_info", headers=headers, timeout=60).json()
            found = {name: info.get(name) for name in ("version", "quantization", "kv_cache_dtype")}
            state = info["internal_states"][0].get("mixquant")
            state = {name: state[name] for name in ("recipe", "fingerprint", "precision", "kernel")} if state else None
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            return {}
        return {**found, "mixquant": state}

    async def chat(self, prompt: str, sampling: Sampling, seed: int, prefix: str = "") -> dict[str, Any]:
        """One answer.  ``prefix``: how the answer begins; the server goes on from there (SGLang can)."""
        messages: list[Any] = [{"role": "user", "content": prompt}]
        body = sampling.body()
        if prefix:
            messages.append({"role": "assistant", "content": prefix})
            body["continue_final_message"] = True
        try:
            answer = await self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,
                extra_body=body,
            )
        except openai.APIConnectionError as error:
            again = "the same command goes on from here once it is up"
            raise Stop(f"{self.root} no longer answers ({reason(error)}): {again}") from None
        except openai.APIStatusError as error:
            raise Stop(f"{self.root} refused a request ({error.status_code}: {reason(error)})") from None
        if not answer.choices:
            raise Stop(f"{self.root} answered without a choice")
        choice, usage = answer.choices[0], answer.usage
        text, thoughts = choice.message.content or "", getattr(choice.message, "reasoning_content", None)
        return {
            "output": f"<think>{thoughts}</think>{text}" if thoughts else text,  # a reasoning parser took them apart
            "finish": choice.finish_reason,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "output_tokens": usage.completion_tokens if usage else None,
        }


class Tokenizer:
    """The tokenizer of an SGLang server, or ``name``, a folder or a hub name, through transformers."""

    def __init__(self, server: Server, name: str | None) -> None:
        self.server, self.local, self.counts = server, None, True
        headers = {"Authorization": f"Bearer {server.key}"}
        self.client = httpx.Client(base_url=server.root, headers=headers, timeout=server.timeout)
        if name:
            try:
                from transformers import AutoTokenizer

                self.local = AutoTokenizer.from_pretrained(name)
            except (ImportError, OSError, ValueError) as error:
                what = str(error).strip().splitlines()[0]
                raise Stop(f"--tokenizer {name}: cannot be loaded ({what})") from None

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        try:
            return self.client.post(path, json=body).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise Stop(f"{self.server.root}{path} does not work ({what}): name a local --tokenizer") from None

    def encode(self, text: str) -> list[int]:
        if self.local is not None:
            return list(self.local.encode(text, add_special_tokens=False))
        body = {"model": self.server.model, "prompt": text, "add_special_tokens": False}
        return list(self._ask("/tokenize", body)["tokens"])

    def count(self, text: str) -> int:
        """Tokens of ``text``; where the server's /tokenize fails, as with some tokenizers, those that it prefills."""
        if self.local is None and self.counts:
            try:
                return len(self.encode(text))
            except Stop as error:
                self.counts = False
                print(f"{error}, or wait: prompts are measured through /generate", file=sys.stderr)
        if self.local is not None:
            return len(self.encode(text))
        body = {"text": text, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        return int(self._ask("/generate", body)["meta_info"]["prompt_tokens"])

    def decode(self, ids: list[int]) -> str:
        if self.local is not None:
            return str(self.local.decode(ids))
        body = {"model": self.server.model, "tokens": ids, "skip_special_tokens": False}
        return str(self._ask("/detokenize", body)["text"])

    def cut_middle(self, text: str, most: int) -> str:
        """``text`` with its middle left out where it has more than ``most`` tokens, as LongBench and LongMemEval do."""
        if len(text.encode()) <= most:  # a token has a byte at least
            return text
        ids = self.encode(text)
        return text if len(ids) <= most else self.decode(ids[: most // 2] + ids[-(most // 2) :])


def arguments(doc: str | None, prog: str, *, max_tokens: int | None, temperature: float, thinking: bool) -> Any:
    """A parser with what all public benchmarks take."""
    parser = argparse.ArgumentParser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:30000", help="of the running server (default: %(default)s)")
    add("--model", help="served model name (default: the only one)")
    add("--api-key-env", metavar="VARIABLE", help="environment variable with the server's API key (default: no key)")
    add("--out", type=Path, required=True, help="folder of the records; a run that was cut short goes on there")
    add("--against", type=Path, help="the --out of another arm: paired difference over the same examples")
    add("--limit", type=_positive, help="first examples of each data set only")
    add("--seeds", type=int, nargs="+", default=[42], help="one sample of each example per seed (default: 42)")
    add("--concurrency", type=_positive, default=32, help="requests at a time (default: %(default)s)")
    add("--temperature", type=float, default=temperature, help="default: %(default)s")
    add("--top-p", type=float, default=0.95, help="default: %(default)s")
    add("--top-k", type=int, default=20, help="0: not sent (default: %(default)s)")
    add("--max-tokens", type=_positive, default=max_tokens, help=f"of an answer (default: {max_tokens or 'by task'})")
    add("--thinking", action=argparse.BooleanOptionalAction, default=thinking, help="enable_thinking of the template")
    add("--extra-body", default="{}", help="more of each request, as JSON: '{\"custom_params\": ...}'")
    add("--timeout", type=float, default=6000, help="seconds for one request (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a positive number")
